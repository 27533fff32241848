#!/bin/sh
# The curriculum paper in small. Figure 5: 18 runs of 600 steps. Table 1, figures 3 and 4: 3 DCGANs and 5
# diffusion models, each with an early.pt of a tenth of its steps. Started again after a kill, it goes on.
set -e; out=out/stability
train() { python train.py --lr 2e-3 --decay 0 --cfg 1 --sample-steps 1 --log-every 30 --out $run "$@" \
  $([ ! -e $run/ckpt.pt ] || echo --resume); }
both() { [ -e $run/early.pt ] || { "$@" --steps $n; cp $run/ckpt.pt $run/early.pt; }; "$@" --steps ${n}0; }
for t in uniform clts:0.3:60 laplace; do for w in const min_snr; do for s in 0 1 2; do for n in 200 400 600
do run=out/densities/${t%%:*}_${w}_$s; grep -qs "^$n," $run/quality.csv && continue
  train --timesteps $t --weighting $w --seed $s --steps $n
  python -m experiments.pareto measure --ckpt $run
done; done; done; done
for seed in 0 1 2; do n=300 run=$out/gan$seed; both python -m experiments.dcgan --out $run --seed $seed; done
for seed in 0 1 2; do n=100 run=$out/vit$seed; both train --classes 0 --seed $seed; done
for f in "--model unet-tiny" "--target eps"; do n=100 run=$out/${f#* }; both train --classes 0 $f; done
python -m experiments.stability consistency --ckpt $out/gan? --out $out/gans.csv
python -m experiments.stability consistency --ckpt $out/vit? --out $out/consistency.csv
python -m experiments.stability consistency --ckpt $out/vit0 $out/unet-tiny $out/eps --out $out/others.csv
python -m experiments.stability hessian --ckpt $out/gan? $out/vit? --t 100 500 900 --out $out/hessian.csv
python -m experiments.stability interpolate --ckpt $out/gan?/*.pt $out/vit?/*.pt --out $out/interpolate.csv
