#!/usr/bin/env bash
# Hugging Face -> Megatron -> Hugging Face, and proof that every byte came back.
#
#   examples/demo.sh [SOURCE [TP [PP [NAME]]]]
#
# Without arguments: the small trained model of this folder at tensor-parallel 2, pipeline-parallel 2, into demo-out/.
# NAME puts the result into demo-out/NAME instead. TRANSCODE names the command, from the repository's root
# (default: transcode; "python -m transcoder.cli" works too). SOURCE is relative to the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -r -a transcode <<<"${TRANSCODE:-.venv/bin/transcode}"
source_dir=${1:-examples/tiny-llama}
tp=${2:-2}
pp=${3:-2}
out=demo-out${4:+/$4}
megatron=$out/megatron
back=$out/huggingface

run() { # prints a command, then runs it
  printf '\n$ %s\n' "$*"
  "$@"
}

digest() { # the SHA-256 of one file, or a word where there is none
  if [[ ! -f $1 ]]; then
    echo "(missing)"
  elif command -v sha256sum >/dev/null; then
    sha256sum <"$1" | cut -d ' ' -f 1
  else
    shasum -a 256 <"$1" | cut -d ' ' -f 1
  fi
}

files() { # every file of both folders, once
  { (cd "$source_dir" && find . -type f) && (cd "$back" && find . -type f); } | sed 's|^\./||' | LC_ALL=C sort -u
}

table() { # SHA-256 of every file, source and result side by side
  local file before after verdict
  printf '\n%-36s  %-24s  %-24s\n' "file" "SHA-256 before" "SHA-256 after"
  while IFS= read -r file; do
    before=$(digest "$source_dir/$file")
    after=$(digest "$back/$file")
    verdict=equal
    [[ $before == "$after" ]] || verdict=DIFFERENT
    printf '%-36s  %-24s  %-24s  %s\n' "$file" "${before:0:24}" "${after:0:24}" "$verdict"
  done < <(files)
}

rm -rf "$out"
mkdir -p "$out"
run "${transcode[@]}" hf2mcore "$source_dir" "$megatron" --tp "$tp" --pp "$pp"
run "${transcode[@]}" inspect "$megatron"
run "${transcode[@]}" verify "$source_dir" "$megatron"
run "${transcode[@]}" mcore2hf "$megatron" "$back"
table
if ! run diff -r "$source_dir" "$back"; then
  printf '\nFAILED: %s and %s differ.\n' "$source_dir" "$back" >&2
  exit 1
fi
printf '\nOK: %s -> Megatron (TP %s, PP %s) -> %s: all %s files are bit-identical.\n' \
  "$source_dir" "$tp" "$pp" "$back" "$(files | wc -l | tr -d ' ')"
