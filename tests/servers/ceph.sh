#!/usr/bin/env bash
# Runs the tests marked `ceph` against Ceph's object gateway: a monitor, a storage daemon in memory, a manager and
# radosgw, all on loopback, all their files in a temporary folder, all ended at the end.
#
#   tests/servers/ceph.sh [pytest arguments]
#
# Needs Debian's packages: apt-get install --no-install-recommends ceph-mon ceph-osd ceph-mgr radosgw curl openssl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PATH:/usr/sbin
for tool in ceph-mon ceph-osd ceph-mgr radosgw radosgw-admin monmaptool ceph curl openssl; do
  command -v "$tool" >/dev/null || { echo "$0: no $tool here; its head says which packages are needed" >&2 && exit 2; }
done
python=${FINETUNE_VENV:-.venv}/bin/python

work=$(mktemp -d)
pids=()
finish() {
  local code=$?
  [ "${#pids[@]}" -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
  wait || true
  if [ "$code" -ne 0 ]; then tail -n 5 "$work"/*.log >&2 || true; fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start() { # start NAME COMMAND...: in the foreground of a job of its own, so that its pid is known
  "${@:2}" >"$work/$1.log" 2>&1 &
  pids+=($!)
}

until_ok() { # until_ok SECONDS COMMAND...
  local end=$((SECONDS + $1))
  until "${@:2}" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "$0: still failing: ${*:2}" >&2 && "${@:2}" >&2 || exit 1; }
    sleep 0.5
  done
}

fsid=$("$python" -c 'import uuid; print(uuid.uuid4())')
monitor=127.0.0.1:$(free_port)
port=$(free_port)
mkdir "$work/mon" "$work/osd" "$work/mgr" "$work/rgw"
export CEPH_CONF=$work/ceph.conf
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon_host = [v2:$monitor/0]
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
public_addr = 127.0.0.1
run_dir = $work
admin_socket = $work/\$name.asok
crash_dir = $work
log_file =
log_to_stderr = true
mon_data = $work/mon
osd_data = $work/osd
mgr_data = $work/mgr
rgw_data = $work/rgw
mon_allow_pool_size_one = true
mon_data_avail_warn = 1
mon_data_avail_crit = 1
mon_max_pg_per_osd = 1000
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
CONF

monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:$monitor/0]" "$work/monmap" >/dev/null
ceph-mon -i a --mkfs --monmap "$work/monmap" >"$work/mkfs-mon.log" 2>&1
start mon ceph-mon -f -i a
until_ok 60 timeout 5 ceph health
start mgr ceph-mgr -f -i x
ceph osd new "$fsid" 0 >/dev/null
ceph-osd -i 0 --mkfs --osd-uuid "$fsid" >"$work/mkfs.log" 2>&1
start osd ceph-osd -f -i 0
until_ok 60 sh -c 'timeout 5 ceph osd stat | grep -q "1 up"'
start rgw radosgw -f -n client.rgw --rgw_frontends="beast endpoint=127.0.0.1:$port"
export AWS_ENDPOINT=http://127.0.0.1:$port AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
until_ok 120 curl -fsS "$AWS_ENDPOINT"
export AWS_ACCESS_KEY_ID=tests AWS_SECRET_ACCESS_KEY=not-a-secret
radosgw-admin user create --uid=tests --display-name=tests --access-key=tests --secret-key=not-a-secret >/dev/null 2>&1
# A bucket is nothing that obstore makes; this is the older, shorter one of S3's two ways to sign.
date=$(LC_ALL=C date -u '+%a, %d %b %Y %H:%M:%S GMT')
signature=$(printf 'PUT\n\n\n%s\n/registries' "$date" | openssl dgst -sha1 -hmac not-a-secret -binary | base64)
curl -fsS -X PUT -H "Date: $date" -H "Authorization: AWS tests:$signature" "$AWS_ENDPOINT/registries"
date -u +%F
echo "$(nproc --all) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(uname -sr)"
radosgw --version
"$python" -c 'import obstore; print("obstore", obstore.__version__)'

FINETUNE_CEPH=s3://registries "$python" -m pytest -m ceph tests/registry "$@"
