#!/usr/bin/env bash
# A model's life on a bare machine: v1 is released and promoted, a worse one is held, a better one becomes v2, and a
# flipped byte is found. Takes a few minutes; leaves all it makes in FOLDER.
#
#   examples/release_story.sh [FOLDER]        needs: pip install '/path/to/deploypipe[demo,release]', openssl
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/story}"
mkdir -p "$out"

day() { python3 -c "import datetime as d; print(d.datetime.now(d.timezone.utc).date() + d.timedelta($1))"; }
say() { printf '\n== %s\n' "$*"; }
compress() { # NAME KEY=VALUE...: a run of its own, with few trials. It may be on HOLD: `gate` decides, with waivers
    local name="$1" settings=() code=0
    for setting in "${@:2}" search.num_trials=3 target.budget.accuracy_drop_pp=3; do settings+=(--set "$setting"); done
    deploypipe run digits x86_cpu --out "$out/$name" "${settings[@]}" || code=$?
    [ "$code" -le 1 ]
}
decide() { # NAME [OPTION...]
    deploypipe gate "$out/$1" --waivers "$out/waivers.toml" "${@:2}"
}
refuse() { # the command has to end with the code that is given first
    local wanted="$1" code=0
    "${@:2}" || code=$?
    [ "$code" -eq "$wanted" ] || { echo "expected exit code $wanted, got $code: ${*:2}" >&2; exit 1; }
}

say "a key pair: the private key stays with the release job, the public one goes to whoever deploys"
[ -f "$out/private.pem" ] || openssl ecparam -name prime256v1 -genkey -noout -out "$out/private.pem"
openssl ec -in "$out/private.pem" -pubout -out "$out/public.pem" 2>/dev/null

say "a waiver: this machine may be too busy for timings, and for a week somebody takes responsibility for that"
for check in latency_p50 latency_against_baseline; do
    printf '[[waiver]]\ncheck = "%s"\nreason = "shared machine: timings decide nothing here"\n' "$check"
    printf 'by = "release story"\ngranted = "%s"\nexpires = "%s"\n\n' "$(day 0)" "$(day 7)"
done > "$out/waivers.toml"

say "version 1: compress, decide, release, promote"
compress v1
decide v1
bundle="$(deploypipe release "$out/v1" --out "$out/bundles" --key "$out/private.pem")"
deploypipe promote "$bundle" --registry "$out/registry" --alias production --key "$out/public.pem"

say "a change makes the model worse: its dense network was trained for one epoch instead of sixteen"
compress worse pipeline.NUM_EPOCHS=1
refuse 1 decide worse --baseline "$out/registry/digits-x86_cpu@production" \
    --markdown "$out/comment.md" --junit "$out/checks.xml"
say "the comment on the pull request"
cat "$out/comment.md"
refuse 1 deploypipe release "$out/worse" --out "$out/bundles" --key "$out/private.pem"

say "the change is corrected: version 2"
compress v2 pipeline.NUM_EPOCHS=20
decide v2 --baseline "$out/registry/digits-x86_cpu@production"
bundle="$(deploypipe release "$out/v2" --out "$out/bundles" --key "$out/private.pem")"
deploypipe promote "$bundle" --registry "$out/registry" --alias production --key "$out/public.pem"

say "where it is deployed: the public key is all one needs"
deploypipe verify "$out/registry/digits-x86_cpu@production" --key "$out/public.pem"

say "one flipped byte"
rm -rf "$out/tampered" && cp -r "$bundle" "$out/tampered"
python3 - "$out/tampered/model.onnx" <<'PYTHON'
import sys
path = sys.argv[1]
content = bytearray(open(path, "rb").read())
content[len(content) // 2] ^= 1
open(path, "wb").write(content)
PYTHON
refuse 2 deploypipe verify "$out/tampered" --key "$out/public.pem"
refuse 2 deploypipe verify "$out/tampered"
say "done: $out"
