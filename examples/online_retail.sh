#!/bin/sh
# Gifts ordered from a web shop, mostly by other shops (Online Retail II). Cancelled rows are left
# out; every rating is 1, so it is not named: what a customer passed over is sampled.
# Reading reports, for all users:
#   users 5,853
#   users below 1 event(s) 23
#   dropped by filter 17,641
#   events 788,247
#
# usage: online_retail.sh DATA OUT [MAX_USERS [FIT_FLAG ...]]
# DATA holds interactions.parquet and items.parquet; OUT gets the run, and the bank in OUT/inferred.
# USERIP names the program, for example USERIP="python -m userip_fast".
set -eu
data=$1 out=$2 max_users=${3:-1000000000}
shift 2
[ $# -eq 0 ] || shift

${USERIP:-userip} fit --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --time timestamp --text "{title}" --filter "not cancelled" \
  --template gifts --max-users "$max_users" --out "$out" "$@"

# A model knows its columns, text and rules: inference needs the data alone.
${USERIP:-userip} infer --model "$out/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --max-users "$max_users" --out "$out/inferred"

${USERIP:-userip} bank lookup "$out/inferred" --on-unknown code 12346 12347 12348
