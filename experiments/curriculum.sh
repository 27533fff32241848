#!/bin/sh
# The curriculum paper in small. Figure 5: 18 runs of 600 steps. Table 1, figures 3 and 4: DCGANs and diffusion
# models, and short runs that are their early past. Started again after a kill, it goes on.
set -e; out=out/stability
train() { python train.py --lr 2e-3 --decay 0 --cfg 1 --sample-steps 1 --log-every 30 --out $run "$@" \
  $([ ! -e $run/ckpt.pt ] || echo --resume); }
gan() { [ -e $run/ckpt.pt ] || python -m experiments.dcgan --out $run "$@"; }
for t in uniform clts:0.3:60 laplace; do for w in const min_snr; do for s in 0 1 2; do for n in 200 400 600
do run=out/densities/${t%%:*}_${w}_$s; grep -qs "^$n," $run/quality.csv && continue
  train --timesteps $t --weighting $w --seed $s --steps $n
  python -m experiments.pareto measure --ckpt $run
done; done; done; done
for s in 0 1 2; do run=$out/gan$s; gan --seed $s; run=$out/gan${s}early; gan --seed $s --steps 300
  for n in 100 1000; do run=$out/vit$s$([ $n = 1000 ] || echo early); train --classes 0 --seed $s --steps $n; done; done
for f in "--model unet-tiny" "--target eps"; do run=$out/${f#* }; train --classes 0 $f --steps 1000; done
measure="python -m experiments.stability"; $measure consistency --ckpt $out/gan? --out $out/gans.csv
$measure consistency --ckpt $out/vit? --out $out/consistency.csv
$measure consistency --ckpt $out/vit0 $out/unet-tiny $out/eps --out $out/others.csv
$measure hessian --ckpt $out/gan? $out/vit? --t 100 500 900 --out $out/hessian.csv
$measure interpolate --ckpt $out/gan?* $out/vit?* --out $out/interpolate.csv
