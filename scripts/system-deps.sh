#!/bin/sh
# Makes sure that the C++ libraries that the runners are built from are on this machine.
#
#   system-deps.sh [--force-unpack] [--onnxruntime] [FOLDER]
#
# Nothing is missing: says nothing, exit 0. Else, on Debian and Ubuntu: installs the missing packages where this user
# may (root, or sudo without a password), and otherwise unpacks them, without root, into FOLDER (default .venv/cxx);
# CMAKE_PREFIX_PATH must then hold FOLDER/usr. Elsewhere: says what to install, exit 2.
# --force-unpack: as if nothing were installed and this user were not root.
#
# onnxruntime's headers, which its wheel lacks, are unpacked into FOLDER too, from the distribution's package or that of
# a newer release of it: headers alone, so nothing of that release gets into this system. The other runners do without
# them, so that it is no failure when they cannot be had, unless --onnxruntime asks for them (and for nothing else).
set -eu

force=
only_onnxruntime=
folder=.venv/cxx
for argument in "$@"; do
  case $argument in
    --force-unpack) force=yes ;;
    --onnxruntime) only_onnxruntime=yes ;;
    -*) echo "system-deps.sh: no option $argument; usage: system-deps.sh [--force-unpack] [--onnxruntime] [FOLDER]" >&2; exit 2 ;;
    *) folder=$argument ;;
  esac
done

# One line a library: header, then its package in Debian and Ubuntu, Fedora, Arch, Homebrew.
table='pcre2.h libpcre2-dev pcre2-devel pcre2 pcre2
nlohmann/json.hpp nlohmann-json3-dev json-devel nlohmann-json nlohmann-json
CLI/CLI.hpp libcli11-dev cli11-devel cli11 cli11
openssl/evp.h libssl-dev openssl-devel openssl openssl@3
boost/multiprecision/cpp_int.hpp libboost-dev boost-devel boost boost
doctest/doctest.h doctest-dev doctest-devel doctest doctest
hwy/highway.h libhwy-dev highway-devel highway highway'

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
    sed -n -E 's/^ *Depends: (libboost[0-9.]+-dev|libssl[0-9.]+(t64)?|libpcre2-8-0|libhwy1(t64)?)$/\1/p' | sort -u
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

# --- onnxruntime's headers

has_onnxruntime() {
  [ -z "$force" ] || return 1
  [ -z "${ONNXRUNTIME_ROOT:-}" ] || return 0
  for prefix in "$folder/usr" /usr /usr/local /opt/homebrew; do
    for place in onnxruntime onnxruntime/core/session .; do
      [ ! -e "$prefix/include/$place/onnxruntime_cxx_api.h" ] || return 0
    done
  done
  return 1
}

# Writes the machine's own package sources, with another release's name in place of this one's, into $work/sources.
derive_sources() { # release
  rm -rf "$work/sources" && mkdir -p "$work/sources"
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ -r "$file" ] || continue
    sed -E -e "/^Suites:/s/\\b(${VERSION_CODENAME:-none}|stable|oldstable)\\b/$1/g" \
      -e "/^deb/s/\\b(${VERSION_CODENAME:-none}|stable|oldstable)(-updates|-security|-backports)?( |\$)/$1\\2\\3/" \
      "$file" >"$work/sources/$(basename "$file")"
  done
}

download_headers() { # further options of apt-get
  # shellcheck disable=SC2086
  (cd "$work/debs" && apt-get -qq $apt_options "$@" download libonnxruntime-dev) >>"$work/log" 2>&1
}

# The package, from the lists that this machine has, or else from those of newer releases that are known to have it.
fetch_headers() {
  download_headers && return
  VERSION_CODENAME=
  ID=
  # shellcheck disable=SC1091
  [ ! -r /etc/os-release ] || . /etc/os-release
  case $ID in
    debian) releases=trixie ;;
    ubuntu) releases='resolute questing plucky' ;;
    *) return 1 ;;
  esac
  for release in $releases; do
    derive_sources "$release"
    set -- -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/sources" \
      -o "Dir::State::Lists=$work/headers-lists" -o Dir::Etc::PreferencesParts=/dev/null
    rm -rf "$work/headers-lists" && mkdir -p "$work/headers-lists/partial"
    # A source without that release is no failure: what counts is whether the package comes.
    # shellcheck disable=SC2086
    apt-get -qq $apt_options "$@" update >>"$work/log" 2>&1 || true
    download_headers "$@" && return
  done
  return 1
}

unpack_onnxruntime() {
  remedy="unpack a release of onnxruntime and set ONNXRUNTIME_ROOT to its folder"
  if ! command -v apt-get >/dev/null 2>&1; then
    echo "system-deps.sh: no headers of onnxruntime, so no runner for ONNX; macOS: brew install onnxruntime; else $remedy" >&2
    return 1
  fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 2' HUP INT TERM
  mkdir -p "$work/debs" "$work/cache/archives/partial" "$work/files"
  apt_options="-o Dir::Cache=$work/cache -o APT::Sandbox::User=root -o Debug::NoLocking=1"
  if ! fetch_headers; then
    echo "system-deps.sh: no package libonnxruntime-dev for this system, so no runner for ONNX; to have one, $remedy" >&2
    return 1
  fi
  for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/files"; done
  mkdir -p "$folder/usr/include"
  cp -a "$work/files/usr/include/onnxruntime" "$folder/usr/include/"
  echo "Unpacked onnxruntime's headers into $folder"
}

compiler=$(find_compiler)
# In a process of its own: it has its own folder to clean up.
has_onnxruntime || (unpack_onnxruntime) || [ -z "$only_onnxruntime" ] || exit 2
[ -z "$only_onnxruntime" ] || exit 0
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
