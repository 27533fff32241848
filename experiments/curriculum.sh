#!/bin/sh
# The curriculum paper in small. Figure 5: 18 runs of 600 steps. Table 1, figures 3 and 4: DCGANs and diffusion
# models, and shorter runs of the same seeds: their early checkpoints. Started again after a kill, it goes on.
set -e
out=out/stability
measure="python -m experiments.stability"

train() {                                        # into $run, from where it was left; cfg and sample-steps 1: a cheap last picture
    resume=
    if [ -e $run/ckpt.pt ]; then resume=--resume; fi
    python train.py --out $run --lr 2e-3 --decay 0 --cfg 1 --sample-steps 1 --log-every 30 "$@" $resume
}
gan() {                                          # into $run, unless it is there
    [ -e $run/ckpt.pt ] || python -m experiments.dcgan --out $run "$@"
}

for density in uniform clts:0.3:60 laplace; do for weighting in const min_snr; do
for seed in 0 1 2; do for steps in 200 400 600; do
    run=out/densities/${density%%:*}_${weighting}_$seed
    if grep -qs "^$steps," $run/quality.csv; then continue; fi       # measured already
    train --timesteps $density --weighting $weighting --seed $seed --steps $steps
    python -m experiments.pareto measure --ckpt $run
done; done; done; done

for seed in 0 1 2; do
    run=$out/gan$seed;        gan --seed $seed
    run=$out/gan${seed}early; gan --seed $seed --steps 300
    run=$out/vit${seed}early; train --classes 0 --seed $seed --steps 100
    run=$out/vit$seed;        train --classes 0 --seed $seed --steps 1000
done
run=$out/unet-tiny; train --classes 0 --model unet-tiny --steps 1000
run=$out/eps;       train --classes 0 --target eps --steps 1000

$measure consistency --ckpt $out/gan? --out $out/gans.csv
$measure consistency --ckpt $out/vit? --out $out/consistency.csv
$measure consistency --ckpt $out/vit0 $out/unet-tiny $out/eps --out $out/others.csv
$measure hessian --ckpt $out/gan? $out/vit? --t 100 500 900 --out $out/hessian.csv
$measure interpolate --ckpt $out/gan[0-9]* $out/vit[0-9]* --out $out/interpolate.csv      # sorted: pairs of late, early
