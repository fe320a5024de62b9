#!/usr/bin/env bash
# All methods at keep 0.9, 0.8 and 0.7 on SmolLM2-135M, side by side:
#   DATA=folder benchmarks/compare.sh OUT [more options of `bolaco compare`]
# DATA has c4_sample.jsonl and wikitext2_raw_test.txt. Documents 1-1000 of C4 calibrate, 1001-1300 are searched on, the
# others and WikiText-2 are reported on. The same command continues a comparison that was stopped.
# KEEP, METHODS and WINDOWS make it smaller.
set -euo pipefail
: "${DATA:?the folder with c4_sample.jsonl and wikitext2_raw_test.txt}"
out=${1:?the folder to write}
shift
methods=${METHODS:-default,bolaco,kfac-svd,svd-llm,afm,asvd,fwsvd,svd,welore,joint,lpaf,chop,aa-svd,mpifa}
# As many steps as the default has; the paper's are 200.
case ",$methods," in *,aa-svd,*) set -- --set aa-svd:refinement.steps=20 "$@" ;; esac
bolaco compare smollm2-135m --dtype float32 \
  --methods "$methods" --keep "${KEEP:-0.9,0.8,0.7}" --seq-len 512 \
  --calibration "$DATA/c4_sample.jsonl[:1000]" --validation "$DATA/c4_sample.jsonl[1000:1300]" \
  --eval "$DATA/wikitext2_raw_test.txt,$DATA/c4_sample.jsonl[1300:]" \
  --set calibration.sequences=64 --set calibration.gradient_sequences=24 \
  --set evaluation.seq_len=1024 --set evaluation.windows="${WINDOWS:-16}" \
  -o "$out" "$@"
