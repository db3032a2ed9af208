#!/bin/sh
# Books read and rated 1 to 5 (goodbooks-10k sample). There are no times, so a user's events are
# told in an order fixed by the seed. Reading reports, for all users:
#   users 2,672
#   items 10,000
#   events 298,176
#
# usage: goodbooks.sh DATA OUT [MAX_USERS [FIT_FLAG ...]]
# DATA holds interactions.parquet and items.parquet; OUT gets the run, and the bank in OUT/inferred.
# USERIP names the program, for example USERIP="python -m userip_fast".
set -eu
data=$1 out=$2 max_users=${3:-1000000000}
shift 2
[ $# -eq 0 ] || shift

${USERIP:-userip} fit --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --rating rating --text "{title}[[ ({genres})]]" \
  --template books --max-tokens 384 --max-users "$max_users" --out "$out" "$@"

# A model knows its columns, text and rules: inference needs the data alone.
${USERIP:-userip} infer --model "$out/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --max-users "$max_users" --out "$out/inferred"

${USERIP:-userip} bank lookup "$out/inferred" --on-unknown code 58 62 69
