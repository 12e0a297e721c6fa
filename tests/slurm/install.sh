#!/bin/sh
# Install the Slurm daemons that the tests run (Debian, Ubuntu). Nothing is started: no daemon of the system is wanted.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=""
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge \
            slurmdbd:slurmdbd mariadbd:mariadb-server; do
  command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
[ -n "$missing" ] || exit 0
case $missing in *slurmdbd*) missing="$missing slurm-wlm-mysql-plugin" ;; esac
[ "$(id -u)" = 0 ] || { echo "Slurm is not installed; as root: apt-get install$missing" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "Slurm is not installed and there is no apt-get" >&2; exit 1; }
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get install -y --no-install-recommends $missing ||
  { apt-get update && apt-get install -y --no-install-recommends $missing; }; } >/dev/null 2>&1 ||
  { echo "apt-get install$missing failed" >&2; exit 1; }
