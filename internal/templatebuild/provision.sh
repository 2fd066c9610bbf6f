# What commands need and an image may lack: bash, which the SDKs run them in,
# sudo, and the certificates that TLS needs. Runs in the image's own shell.
missing=
command -v bash >/dev/null || missing="$missing bash"
command -v sudo >/dev/null || missing="$missing sudo"
[ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || missing="$missing ca-certificates"
if [ -n "$missing" ]; then
  echo "the image lacks$missing; installing"
  if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o Acquire::Retries=1 update && apt-get -q install -y --no-install-recommends $missing
  elif command -v apk >/dev/null; then apk add --no-cache $missing
  elif command -v dnf >/dev/null; then dnf install -y $missing
  elif command -v microdnf >/dev/null; then microdnf install -y $missing
  elif command -v yum >/dev/null; then yum install -y $missing
  elif command -v zypper >/dev/null; then zypper -n install $missing
  elif command -v pacman >/dev/null; then pacman -Syu --noconfirm $missing
  else echo "it has no package manager that is known" >&2
  fi
fi
bash=$(command -v bash) || { echo "the image has no bash, which commands run in, and it could not be installed: take an image that has it" >&2; exit 1; }
[ -e /bin/bash ] || ln -s "$bash" /bin/bash
command -v sudo >/dev/null || echo "without sudo, what needs root is for commands of the user root" >&2
exit 0
