#!/usr/bin/env bash
# OpenAI's API compatibility test (github.com/openai/gpt-oss, folder compatibility-test): 30 cases through the Agents SDK for
# JavaScript, each over /v1/responses and /v1/chat/completions, then over streamed chat.
#
#   bench/compat_openai.sh                                   against a scripted model: what is checked is the API's shape
#   bench/compat_openai.sh --url http://127.0.0.1:8000/v1 --model gpt-oss-20b [--key-file F]     against a running server
#   ... --source DIR                                         a copy of that folder, in place of a clone
#
# Needs node 20 with npm, git, python with gptoss[serve,test], and for the scripted model o200k_base.tiktoken in TIKTOKEN_CACHE_DIR.
# Everything it installs goes into a temporary directory. Fails unless every case passes. The test itself cannot pass streamed
# responses (it looks for their events one level too deep), so those are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

url='' model=scripted key=none source='' port=${GPTOSS_COMPAT_PORT:-8123}
while [ $# -gt 0 ]; do
  case $1 in
    --url) url=$2 ;;
    --model) model=$2 ;;
    --key-file) key=$(cat "$2") ;;
    --source) source=$(realpath "$2") ;;
    *)
      sed -n '2,/^set/{/^#/p}' "$0"
      exit 2
      ;;
  esac
  shift 2
done

work=$(mktemp -d)
server=''
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true; rm -rf "$work"' EXIT

if [ -z "$source" ]; then
  git clone -q --depth 1 --filter=blob:none --sparse https://github.com/openai/gpt-oss "$work/gpt-oss"
  git -C "$work/gpt-oss" sparse-checkout set compatibility-test
  source=$work/gpt-oss/compatibility-test
fi
mkdir "$work/test"
cp "$source"/*.ts "$source"/*.json "$source"/*.jsonl "$work/test/"
(cd "$work/test" && npm ci --silent --no-audit --no-fund && npm install --silent --no-save --no-audit --no-fund tsx@4)

if [ -z "$url" ]; then
  url=http://127.0.0.1:$port/v1
  python tests/compat_server.py --port "$port" &
  server=$!
  for _ in $(seq 120); do
    kill -0 "$server"
    curl -fs -o /dev/null "http://127.0.0.1:$port/health" && break
    sleep 0.5
  done
fi

# What the test knows of a server: two entries, since only chat is streamed.
COMPAT_KEY=$key python - "$url" "$model" > "$work/test/providers.ts" << 'EOF'
import json
import os
import sys

url, model = sys.argv[1:]
common = {"apiBaseUrl": url, "apiKey": os.environ["COMPAT_KEY"], "modelName": model, "providerDetails": {}}
providers = {"both": {**common, "apiType": ["responses", "chat"]}, "chat": {**common, "apiType": ["chat"]}}
print(f"export const PROVIDERS: Record<string, any> = {json.dumps(providers)};")
EOF

cd "$work/test"
for run in "both" "chat --streaming"; do
  echo "== $run"
  # shellcheck disable=SC2086
  npm start --silent -- --provider $run > "$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
  }
  sed -n '/^Summary/,$p' "$work/log"
done

python - << 'EOF'
import glob
import json
from collections import Counter

good, runs = Counter(), Counter()
for path in sorted(glob.glob("rollout_*.jsonl")):
    how = path.split("_")[1]
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        if "error" in row:
            print(f"case {row['test_case']}: {row['error']}")
        kind = row["result"]["apiType"] if "result" in row else "failed"
        name = f"{kind}, streamed" if how == "chat" else kind
        runs[name] += 1
        good[name] += bool(row.get("success"))
for name in runs:
    print(f"{name}: {good[name]} of {runs[name]}")
raise SystemExit(good != runs or sum(runs.values()) != 90)
EOF
