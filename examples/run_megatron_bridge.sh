#!/usr/bin/env bash
# The usual runs of the megatron_bridge backend, from a menu or by name; --help says how.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
modes=(sft hf lora export)

usage() {
    cat <<'TEXT'
run_megatron_bridge.sh: fine-tune a model and export it

usage: bash run_megatron_bridge.sh                             a menu
       bash run_megatron_bridge.sh sft    [more of the command]  all weights, from a Megatron checkpoint
       bash run_megatron_bridge.sh hf     [more of the command]  all weights, from a Hugging Face model, and back to one
       bash run_megatron_bridge.sh lora   [more of the command]  LoRA, from a Hugging Face model
       bash run_megatron_bridge.sh export [more of the command]  a run's newest checkpoint to Hugging Face

environment, with what stands for it when unset:
  MODEL       Hugging Face folder or hub id of hf and lora      meta-llama/Llama-3.2-1B
  CHECKPOINT  sft: the Megatron checkpoint to start from        checkpoints/llama
              export: the run to export                         output/hf
  DATA        instruction data: a file, a folder or a hub id    tatsu-lab/alpaca
  SAVE        the run's folder                                  output/MODE
  HF_SAVE     where export writes                               CHECKPOINT/hf_export

What follows the mode goes to the command, where it wins: bash run_megatron_bridge.sh lora --train_iters 100 --dry_run
A checkpoint for sft: primus convert --convert_from_hf --hf_model_name_or_path MODEL --save checkpoints/llama
TEXT
}

fail() {
    printf 'run_megatron_bridge.sh: %s\n' "$1" >&2
    exit 2
}

describe() {
    case $1 in
        sft) echo "fine-tune all weights of a Megatron checkpoint" ;;
        hf) echo "fine-tune all weights of a Hugging Face model" ;;
        lora) echo "LoRA on a Hugging Face model" ;;
        export) echo "export a run to Hugging Face" ;;
    esac
}

# ask NAME DEFAULT: the variable from the environment, else from the terminal in the menu, else the default
ask() {
    local answer=${!1:-}
    if [[ -z $answer && $interactive == yes ]]; then
        read -r -p "$1 [$2]: " answer || true
    fi
    printf -v "$1" '%s' "${answer:-$2}"
}

choose() {
    local index answer
    printf 'primus on megatron_bridge:\n' >&2
    for index in "${!modes[@]}"; do
        printf '  %d) %-7s %s\n' $((index + 1)) "${modes[index]}" "$(describe "${modes[index]}")" >&2
    done
    while read -r -p "a number or a name, q to leave: " answer; do
        case $answer in
            q | quit) exit 0 ;;
            [1-4]) answer=${modes[answer - 1]} ;;
        esac
        for mode in "${modes[@]}"; do
            [[ $answer == "$mode" ]] && return
        done
        printf "there is no '%s'\n" "$answer" >&2
    done
    exit 0
}

run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    exec "$@"
}

interactive=no
mode=${1:-}
case $mode in
    -h | --help | help)
        usage
        exit 0
        ;;
    "")
        [[ -t 0 ]] || fail "no mode and no terminal for the menu: sft, hf, lora or export, or --help"
        interactive=yes
        choose
        ;;
    sft | hf | lora | export) shift ;;
    *) fail "unknown mode '$mode': sft, hf, lora or export, or --help" ;;
esac
command -v primus >/dev/null || fail "the command primus is not there: pip install it, and activate its environment"

train=(primus train --framework megatron_bridge)
case $mode in
    sft)
        ask CHECKPOINT checkpoints/llama
        ask DATA tatsu-lab/alpaca
        ask SAVE output/sft
        run "${train[@]}" --config "$here/llama_sft_posttrain.yaml" \
            --load "$CHECKPOINT" --data_path "$DATA" --save "$SAVE" "$@"
        ;;
    hf)
        ask MODEL meta-llama/Llama-3.2-1B
        ask DATA tatsu-lab/alpaca
        ask SAVE output/hf
        run "${train[@]}" --convert_from_hf --hf_model_name_or_path "$MODEL" --data_path "$DATA" \
            --lr 5e-6 --train_iters 5000 --convert_to_hf --save "$SAVE" "$@"
        ;;
    lora)
        ask MODEL meta-llama/Llama-3.2-1B
        ask DATA tatsu-lab/alpaca
        ask SAVE output/lora
        run "${train[@]}" --config "$here/llama_lora_posttrain.yaml" --use_lora --lora_rank 16 --lora_alpha 32 \
            --hf_model_name_or_path "$MODEL" --data_path "$DATA" --save "$SAVE" "$@"
        ;;
    export)
        ask CHECKPOINT output/hf
        ask HF_SAVE "$CHECKPOINT/hf_export"
        run primus convert --framework megatron_bridge --load "$CHECKPOINT" --convert_to_hf --hf_save_path "$HF_SAVE" "$@"
        ;;
esac
