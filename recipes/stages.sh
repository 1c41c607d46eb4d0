# Sourced by the recipes that train on GPUs: the environment, the launcher, the order of stages.
#
#   bash recipes/NAME.sh [WHICH]                             every stage, in order
#   bash recipes/NAME.sh [WHICH] STAGE [flags]               one stage; a later flag wins
#   bash recipes/NAME.sh [WHICH] STAGE --dry_run             print the plan, load no weights
#   bash recipes/NAME.sh WHICH --faithful [STAGE [flags]]    as the original did, see patch_code
#
# From the environment: MODEL, RUN (output folder), GPUS (per machine), NODES, LAUNCH (instead of
# torchrun on this machine), BENCHMARKS (a folder of files such as aime24.jsonl, or hub).

# shellcheck source=recipes/setup.sh
source recipes/setup.sh

CODE=. # the tree that runs
BENCHMARKS=${BENCHMARKS:-hub}
NODES=${NODES:-1}
# After SIGTERM torchrun waits so long for its ranks: a step and its checkpoint fit.
launch="torchrun --standalone --nproc_per_node $GPUS --shutdown_timeout 540"
read -ra LAUNCH <<< "${LAUNCH:-$launch}"

run_stages() { # run_stages "STAGES IN ORDER" "$@" of the recipe, which has a function for each
  local stages=$1 stage
  shift
  if [ "${1:-}" = --faithful ]; then
    shift
    RUN=${RUN}_faithful
    patch_code
  else
    sft_faithful=() grpo_faithful=() evaluate_faithful=()
  fi
  case " $stages " in
    *" ${1:-none} "*) "$@" ;;
    *)
      if [ $# -gt 0 ]; then
        echo "$0: '$1' is no stage of this recipe; choose one of: $stages." \
          "Flags come after a stage" >&2
        return 2
      fi
      for stage in $stages; do "$stage"; done
      ;;
  esac
}

patch_code() { # copy this tree to $RUN/code and apply the recipe's patch: the run keeps its code
  : "${PATCH:?this recipe has no original}"
  CODE=$RUN/code
  if [ -d "$CODE" ]; then
    echo "faithful: running $CODE, which an earlier stage has made" >&2
    return
  fi
  rm -rf "$CODE.tmp"
  mkdir -p "$CODE.tmp"
  cp ./*.py "$CODE.tmp"
  cp -r recipes "$CODE.tmp"
  if ! apply_patch "$CODE.tmp" "$PWD/recipes/originals/$PATCH.patch"; then
    echo "faithful: recipes/originals/$PATCH.patch does not apply to this tree (above);" \
      "recipes/README.md says how to make it again" >&2
    return 1
  fi
  mv "$CODE.tmp" "$CODE"
  echo "faithful: running $CODE, this tree with recipes/originals/$PATCH.patch" >&2
}

apply_patch() ( # apply_patch FOLDER PATCH
  cd "$1"
  # Inside a checkout git apply would read paths from the checkout's top, and silently do nothing.
  unset GIT_DIR GIT_WORK_TREE
  GIT_CEILING_DIRECTORIES=$(dirname "$PWD") git apply --whitespace=nowarn "$2"
)

build_data() { # build_data SET FILE [flags]
  python "$CODE/recipes/build_data.py" "$1" --output "$2" --benchmarks "$BENCHMARKS" "${@:3}"
}

check_data() { # check_data FILE [flags]
  python "$CODE/recipes/build_data.py" check "$1" --benchmarks "$BENCHMARKS" "${@:2}"
}

launch_evaluation() { # evaluate.py has no plan to print: with --dry_run the command itself is shown
  if [ "$BENCHMARKS" != hub ]; then set -- --benchmark_dir "$BENCHMARKS" "$@"; fi
  case " $* " in
    *" --dry_run "*) echo "${LAUNCH[@]}" "$CODE/evaluate.py" "$@" ;;
    *) "${LAUNCH[@]}" "$CODE/evaluate.py" "$@" ;;
  esac
}
