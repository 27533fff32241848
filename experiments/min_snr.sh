#!/bin/sh
# Figures 4 to 6 of the Min-SNR paper in small, and when each weighting gets to the best one's error. Started again
# after a kill, it goes on. Settings come from the environment:
#
#   DATA="shapes crops" WEIGHTINGS="const min_snr" TARGETS=x0 STEPS=10000 EVERY=1250 sh experiments/min_snr.sh
#
# SEEDS: one run each. EMA: rate of the average weights. EVERY: steps between snapshots, which are measured with N
# samples. JOBS: runs at a time. FLAGS: more flags of train.py. OBJECTIVE= (empty) leaves out figure 4, which takes
# minutes. OUT: the folder; for another EMA or N, or other FLAGS, choose another one.
export DATA="${DATA:-shapes}" TARGETS="${TARGETS:-x0 eps v}" SEEDS="${SEEDS:-0 1 2}"
export WEIGHTINGS="${WEIGHTINGS:-const snr max_snr min_snr}"
export STEPS="${STEPS:-600}" EVERY="${EVERY:-200}" EMA="${EMA:-.99}" N="${N:-256}" FLAGS
export JOBS="${JOBS:-1}" OBJECTIVE="${OBJECTIVE-1}" OUT="${OUT:-out/min_snr}" PYTHON="${PYTHON:-python}"

try() {                                          # a command, and what its exit code means for the study
    code=0
    "$@" || code=$?
    case $code in
        0|3) ;;                                  # 3: the run has diverged, which is a result
        *) echo "$out: exit code $code of $*" >&2; exit 1;;
    esac
}

one_run() {                                      # data, weighting, target, seed
    out=$OUT/$1_$3_$2_$4
    gamma=5
    if [ $2 = max_snr ]; then gamma=1; fi
    resume=                                      # of a run that is there, train.py refuses other settings
    if [ -e $out/ckpt.pt ]; then resume=--resume; fi
    # shapes and folders have different presets, so every setting that differs is given
    try $PYTHON train.py --out $out --dataset $1 --weighting $2 --gamma $gamma --target $3 --seed $4 \
        --model vit-tiny --batch-size 64 --lr 2e-3 --warmup 100 --decay 0 --betas .9 .99 --weight-decay .03 \
        --ema $EMA --drop .1 --no-flip --no-compile --cfg 1 --sample-steps 1 --log-every $(((STEPS + 19) / 20)) \
        --steps $STEPS --keep-every $EVERY --save-every $EVERY $FLAGS $resume
    [ -e $out/ckpt.pt ] || return 0                                      # diverged before it saved a checkpoint
    try $PYTHON -m experiments.pareto measure --ckpt $out --n $N         # what is not measured yet
    if [ "$OBJECTIVE" ] && [ "$2 $3" = "min_snr x0" ] && [ ! -e $out/objective.csv ]; then
        try $PYTHON -m experiments.pareto objective --ckpt $out --out $out/objective.csv
    fi
}

if [ $# -gt 0 ]; then                            # started by xargs below
    one_run "$@"
    exit
fi
for size in STEPS EVERY N JOBS; do
    least=1
    if [ $size = N ]; then least=2; fi
    if ! [ "$(printenv $size)" -ge $least ] 2>/dev/null; then
        echo "min_snr.sh: $size: found $(printenv $size), expected a whole number, at least $least" >&2
        exit 2
    fi
done
[ $JOBS -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"        # several runs share the cores
case " $DATA " in *" crops "*) [ -e data/crops/sheet.png ] || $PYTHON -m experiments.crops || exit;; esac
for seed in $SEEDS; do for data in $DATA; do for target in $TARGETS; do for weighting in $WEIGHTINGS; do
    echo $data $weighting $target $seed
done; done; done; done | xargs -n 4 -P $JOBS sh "$0"
failed=$?
$PYTHON -m experiments.pareto needs --runs $OUT/*/ --out $OUT/needs.csv || failed=1
if ! $PYTHON -c "import matplotlib" 2>/dev/null; then
    echo "no figures: they need pip install matplotlib"
    exit $failed
fi
draw="$PYTHON -m experiments.figures"
runs="$draw runs $OUT/*/ --panel dataset target --logy"
for data in $DATA; do
    set -- $OUT/${data}_x0_min_snr_*/objective.csv
    [ -e "$1" ] || continue
    $draw bars "$@" --x weighting --y over_optimum --logy --out $OUT/figure4_$data.png || failed=1
done
$runs --y fd_pixels --out $OUT/figure5.png || failed=1
$runs --y x0_mse_0 x0_mse_2 x0_mse_6 x0_mse_8 --out $OUT/figure6.png || failed=1
$runs --y fd_pixels fd_judge recognised x0_mse --out $OUT/quality.png || failed=1
exit $failed
