#!/bin/sh
# Groceries bought (Complete Journey sample). Every rating is 1, so it is not named: what a shopper
# passed over is sampled. 222 rows name products that are not in the table and 60 have no title.
# Reading reports, for all users:
#   users 2,374
#   users below 1 event(s) 3
#   unknown item 222
#   empty text 60
#   events 74,718
#
# usage: completejourney.sh DATA OUT [MAX_USERS [FIT_FLAG ...]]
# DATA holds interactions.parquet and items.parquet; OUT gets the run, and the bank in OUT/inferred.
# USERIP names the program, for example USERIP="python -m userip_fast".
set -eu
data=$1 out=$2 max_users=${3:-1000000000}
shift 2
[ $# -eq 0 ] || shift

${USERIP:-userip} fit --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --time timestamp --text "{title}" --on-bad skip \
  --template grocery --max-users "$max_users" --out "$out" "$@"

# A model knows its columns, text and rules: inference needs the data alone.
${USERIP:-userip} infer --model "$out/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --max-users "$max_users" --out "$out/inferred"

${USERIP:-userip} bank lookup "$out/inferred" --on-unknown code 1 2 3
