#!/bin/sh
# Figures 4 to 6 in small: four weightings, three targets, three seeds, 600 steps, 36 runs. Started again after
# a kill, it goes on. train.py's exit code 3 says that the run has diverged: the loop leaves it there.
set -e
for flags in "const" "snr" "max_snr --gamma 1" "min_snr --gamma 5"; do for target in x0 eps v; do for seed in 0 1 2; do
    out=out/min_snr/${target}_${flags%% *}_$seed resume=
    for steps in 200 400 600; do
        grep -qs "^$steps," $out/quality.csv && continue
        [ ! -e $out/ckpt.pt ] || resume=--resume
        python train.py --out $out --weighting $flags --target $target --seed $seed --lr 2e-3 --decay 0 --cfg 1 \
            --sample-steps 1 --log-every 30 --steps $steps $resume || { [ $? -eq 3 ]; break; }
        python -m experiments.pareto measure --ckpt $out
    done
done; done; done
for seed in 0 1 2; do
    python -m experiments.pareto objective --ckpt out/min_snr/x0_min_snr_$seed --out out/min_snr/objective_$seed.csv
done
draw="python -m experiments.figures"
$draw bars out/min_snr/objective_*.csv --x weighting --y over_optimum --logy --out out/min_snr/figure4.png
$draw runs out/min_snr/*/ --y fd_pixels --logy --out out/min_snr/figure5.png
$draw runs out/min_snr/*/ --y x0_mse_0 x0_mse_2 x0_mse_6 x0_mse_8 --logy --out out/min_snr/figure6.png
