# Sourced by the 14B recipes and Open-RS: the environment, the launcher, and the order of stages.
#
#   bash recipes/NAME.sh                            every stage, in order
#   bash recipes/NAME.sh STAGE [flags]              one stage; a later flag wins over the recipe's
#   bash recipes/NAME.sh STAGE --dry_run            print the plan, load nothing
#   bash recipes/NAME.sh --faithful [STAGE [flags]] with the originals' oddities, into a run folder of its own
#
# From the environment: MODEL, RUN (output folder), BENCHMARKS (a folder of files such as aime24.jsonl, or hub), GPUS (per
# machine), NODES, LAUNCH (instead of torchrun on this machine).

# shellcheck source=recipes/setup.sh
source recipes/setup.sh

BENCHMARKS=${BENCHMARKS:-hub}
NODES=${NODES:-1}
read -ra LAUNCH <<< "${LAUNCH:-torchrun --standalone --nproc_per_node $GPUS --shutdown_timeout 540}"  # a step and its checkpoint fit

run_stages() { # run_stages "STAGES IN ORDER" "$@" of the recipe, which has a function for each stage
  local stages=$1 stage
  shift
  if [ "${1:-}" = --faithful ]; then
    shift
    RUN=${RUN}_faithful
  else
    sft_faithful=() grpo_faithful=() evaluate_faithful=()
  fi
  case " $stages " in
    *" ${1:-none} "*) "$@" ;;
    *)
      if [ $# -gt 0 ]; then
        echo "$0: '$1' is no stage of this recipe; choose one of: $stages. Flags come after a stage" >&2
        exit 2
      fi
      for stage in $stages; do "$stage"; done
      ;;
  esac
}

launch_evaluation() { # evaluate.py has no plan to print: with --dry_run the command itself is shown
  if [ "$BENCHMARKS" != hub ]; then set -- --benchmark_dir "$BENCHMARKS" "$@"; fi
  case " $* " in
    *" --dry_run "*) echo "${LAUNCH[@]}" evaluate.py "$@" ;;
    *) "${LAUNCH[@]}" evaluate.py "$@" ;;
  esac
}
