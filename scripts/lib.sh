# What the other scripts share; they source it.

step() { printf '\n== %s\n' "$*"; }

# Installs Debian packages, or says which are missing.
install() {
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      echo "please install: $*" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  command -v apt-get >/dev/null || { echo "please install the like of Debian's: $*" >&2; exit 1; }
  "${as_root[@]}" apt-get update -q
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -qy --no-install-recommends "$@"
}

# The server programs stand outside PATH on Debian.
has_postgres() {
  command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 \
    || [ -x "$(pg_config --bindir 2>/dev/null)/postgres" ]
}

# What a C compiler, a PostgreSQL and a PgBouncer of one's own (tests/support/), and the tests need; into
# 'missing'. Debian may start services of these packages, which nothing here uses.
look_for_basics() {
  command -v cc >/dev/null || missing+=(gcc libc6-dev)
  command -v make >/dev/null || missing+=(make)
  has_postgres || missing+=(postgresql)
  command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
  command -v openssl >/dev/null || missing+=(openssl)
  command -v ps >/dev/null || missing+=(procps)
  command -v setpriv >/dev/null || missing+=(util-linux)
  command -v faketime >/dev/null || missing+=(faketime)
  command -v promtool >/dev/null || missing+=(prometheus)
  command -v logrotate >/dev/null || [ -x /usr/sbin/logrotate ] || missing+=(logrotate)
}

install_missing() {
  if [ ${#missing[@]} -gt 0 ]; then
    step "installing ${missing[*]}"
    install "${missing[@]}"
  fi
}

# Whether Node is here, as new as the TypeScript client needs.
has_node() {
  command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) >= 18 ? 0 : 1)' 2>/dev/null
}
