#!/bin/sh
# Makes sure that the C++ libraries that the runners are built from are on this machine.
#
#   system-deps.sh [--force-unpack] [FOLDER]
#
# Nothing is missing: says nothing, exit 0. Else, on Debian and Ubuntu: installs the missing packages where this user
# may (root, or sudo without a password), and otherwise unpacks them, without root, into FOLDER (default .venv/cxx);
# CMAKE_PREFIX_PATH must then hold FOLDER/usr. Elsewhere: says what to install, exit 2.
# --force-unpack: as if nothing were installed and this user were not root.
set -eu

force=
folder=.venv/cxx
for argument in "$@"; do
  case $argument in
    --force-unpack) force=yes ;;
    -*) echo "system-deps.sh: no option $argument; usage: system-deps.sh [--force-unpack] [FOLDER]" >&2; exit 2 ;;
    *) folder=$argument ;;
  esac
done

# One line a library: header, then its package in Debian and Ubuntu, Fedora, Arch, Homebrew.
table='pcre2.h libpcre2-dev pcre2-devel pcre2 pcre2
nlohmann/json.hpp nlohmann-json3-dev json-devel nlohmann-json nlohmann-json
CLI/CLI.hpp libcli11-dev cli11-devel cli11 cli11
openssl/evp.h libssl-dev openssl-devel openssl openssl@3
boost/multiprecision/cpp_int.hpp libboost-dev boost-devel boost boost
doctest/doctest.h doctest-dev doctest-devel doctest doctest'

find_compiler() {
  for compiler in "${CXX:-c++}" g++ clang++; do
    # CXX may hold a launcher or options too, so it is split into words
    # shellcheck disable=SC2086
    set -- $compiler
    if command -v "$1" >/dev/null 2>&1; then
      echo "$compiler"
      return
    fi
  done
}

# -I options for what CMake is told to search besides the compiler's own folders.
include_options() {
  arch=$($compiler -print-multiarch 2>/dev/null || true)
  prefixes=$folder/usr:$(printf %s "${CMAKE_PREFIX_PATH:-}" | tr ';' ':')
  if command -v brew >/dev/null 2>&1; then
    prefixes=$prefixes:$(brew --prefix):$(brew --prefix openssl@3)
  fi
  old_ifs=$IFS
  IFS=:
  for prefix in $prefixes; do
    [ -z "$prefix" ] || printf -- '-I\n%s\n-I\n%s\n' "$prefix/include" "$prefix/include/$arch"
  done
  IFS=$old_ifs
}

# Lines of the table whose header the compiler does not find.
missing_lines() {
  if [ -z "$compiler" ] || [ -n "$force" ]; then
    echo "$table"
    return
  fi
  probe=$(echo "$table" | while read -r header rest; do
    printf '#if !__has_include(<%s>)\n@%s %s\n#endif\n' "$header" "$header" "$rest"
  done)
  old_ifs=$IFS
  IFS='
'
  # Options are one a line, so that folders may have spaces; the compiler is split at its own spaces.
  # shellcheck disable=SC2046
  set -- $(include_options)
  IFS=$old_ifs
  # shellcheck disable=SC2086
  answer=$(printf '%s\n@end\n' "$probe" | $compiler -E -x c++ "$@" - || true)
  case $answer in
    *@end*) echo "$answer" | sed -n '/^@end/d; s/^@//p' ;;
    *) echo "system-deps.sh: the C++ compiler ($compiler) does not work" >&2; return 2 ;;
  esac
}

column() { echo "$missing" | awk -v n="$1" '{ printf "%s%s", (NR > 1 ? " " : ""), $n }'; }

say_what_to_install() {
  gxx=
  [ -n "$compiler" ] || gxx=" g++"
  echo "system-deps.sh: $1; install what is missing: Debian, Ubuntu: apt-get install$gxx $(column 2) |" \
    "Fedora: dnf install $(column 3) | Arch: pacman -S $(column 4) | macOS: brew install $(column 5)" >&2
  exit 2
}

install_packages() { # with this prefix to the command: "" or "sudo -n"
  wanted=$(column 2)
  [ -n "$compiler" ] || wanted="$wanted g++"
  echo "Installing $wanted"
  # shellcheck disable=SC2086
  $1 apt-get -qq -o DPkg::Lock::Timeout=300 update || echo "system-deps.sh: apt-get update failed; going on" >&2
  # shellcheck disable=SC2086
  $1 env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
    install --no-install-recommends $wanted >/dev/null || say_what_to_install "apt-get install failed"
}

# What has the headers where the package itself is empty (boost), and the shared libraries that the .so links name.
with_dependencies() {
  echo "$1" | tr ' ' '\n'
  # shellcheck disable=SC2086
  apt-cache $apt_options depends --important $1 2>/dev/null |
    sed -n -E 's/^ *Depends: (libboost[0-9.]+-dev|libssl[0-9.]+(t64)?|libpcre2-8-0)$/\1/p' | sort -u
}

download() { # packages of column 2, into $work/debs
  # shellcheck disable=SC2046,SC2086
  (cd "$work/debs" && apt-get -qq $apt_options download $(with_dependencies "$(column 2)")) >"$work/log" 2>&1
}

unpack_packages() {
  [ -n "$compiler" ] || say_what_to_install "there is no C++ compiler"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 2' HUP INT TERM
  mkdir -p "$work/debs" "$work/cache/archives/partial" "$work/lists/partial" "$work/files"
  apt_options="-o Dir::Cache=$work/cache -o APT::Sandbox::User=root -o Debug::NoLocking=1"
  echo "Downloading $(column 2) into $folder (no root is needed)"
  if ! download; then
    # No package lists on this machine, or old ones: fetch our own.
    apt_options="$apt_options -o Dir::State::Lists=$work/lists"
    # shellcheck disable=SC2086
    if ! { apt-get -qq $apt_options -o APT::Update::Error-Mode=any update >"$work/log" 2>&1 && download; }; then
      say_what_to_install "the packages could not be downloaded ($(grep -m1 '^E:' "$work/log" || echo 'see apt-get update'))"
    fi
  fi
  for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/files"; done
  mkdir -p "$folder"
  cp -a "$work/files/." "$folder/"
  for header in $(column 1); do
    [ -e "$folder/usr/include/$header" ] || say_what_to_install "$header is not in the unpacked packages"
  done
  echo "Unpacked; CMake finds them with CMAKE_PREFIX_PATH=$folder/usr"
}

compiler=$(find_compiler)
missing=$(missing_lines)
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null 2>&1 || say_what_to_install "C++ libraries are missing"
if [ -n "$force" ]; then
  unpack_packages
elif [ "$(id -u)" = 0 ]; then
  install_packages ""
elif sudo -n true 2>/dev/null; then
  install_packages "sudo -n"
else
  unpack_packages
fi
