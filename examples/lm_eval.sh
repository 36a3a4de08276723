#!/bin/sh
# Score the model of a running `octavo serve` with EleutherAI's harness (pip install "lm_eval[api]" transformers).
#
# usage: lm_eval.sh ADDRESS MODEL TOKENIZER [lm_eval's own options]
#
#   octavo convert menny menny-hf --to hf        # TOKENIZER is a folder (or Hub id) that transformers can read
#   examples/lm_eval.sh http://127.0.0.1:8000/v1 menny menny-hf --tasks arc_easy --limit 50
#
# Prompts go as token ids (tokenized_requests), so that the harness and the server agree on where a continuation
# begins; those models want BOS in front (add_bos_token). max_length is the model's context.
set -eu
address=$1 model=$2 tokenizer=$3
shift 3
export OPENAI_API_KEY="${OCTAVO_API_KEY:-none}"
settings="model=$model,base_url=$address/completions,tokenizer=$tokenizer,tokenizer_backend=huggingface"
settings="$settings,tokenized_requests=True,add_bos_token=True,num_concurrent=8,max_length=${MAX_LENGTH:-512}"
exec lm_eval --model local-completions --model_args "$settings" "$@"
