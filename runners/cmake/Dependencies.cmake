# Finds what the runners are built from and makes one imported target of each: nanochat_x_deps::NAME.
#
# Headers and libraries are searched for as they lie, without the packages' own CMake or pkg-config files, so that Debian
# packages unpacked into a folder serve as well as installed ones: put the folder's usr/ on CMAKE_PREFIX_PATH.
# What is missing is told all at once, one line each, with the package to install.

set(_nanochat_x_missing "")

# nanochat_x_missing(<what> <Debian package> <brew formula> <vcpkg port>)
function(nanochat_x_missing what debian brew vcpkg)
  string(APPEND _nanochat_x_missing
    "\n  ${what} is missing: apt-get install ${debian} | brew install ${brew} | vcpkg install ${vcpkg}")
  set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
endfunction()

# nanochat_x_headers(<target> <header> <what> <Debian> <brew> <vcpkg>): a library that is headers alone
function(nanochat_x_headers target header what debian brew vcpkg)
  string(TOUPPER "NANOCHAT_X_${target}_INCLUDE_DIR" variable)
  find_path(${variable} "${header}")
  mark_as_advanced(${variable})
  if(NOT ${variable})
    nanochat_x_missing("${what}" ${debian} ${brew} ${vcpkg})
    set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
    return()
  endif()
  add_library(nanochat_x_deps::${target} INTERFACE IMPORTED)
  target_include_directories(nanochat_x_deps::${target} INTERFACE "${${variable}}")
endfunction()

# nanochat_x_library(<target> <header> <what> <Debian> <brew> <vcpkg> <name of the library>...): headers and a library
function(nanochat_x_library target header what debian brew vcpkg)
  string(TOUPPER "NANOCHAT_X_${target}" prefix)
  find_path(${prefix}_INCLUDE_DIR "${header}")
  find_library(${prefix}_LIBRARY NAMES ${ARGN})
  mark_as_advanced(${prefix}_INCLUDE_DIR ${prefix}_LIBRARY)
  if(NOT ${prefix}_INCLUDE_DIR OR NOT ${prefix}_LIBRARY)
    nanochat_x_missing("${what}" ${debian} ${brew} ${vcpkg})
    set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
    return()
  endif()
  add_library(nanochat_x_deps::${target} UNKNOWN IMPORTED)
  set_target_properties(nanochat_x_deps::${target} PROPERTIES
    IMPORTED_LOCATION "${${prefix}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${${prefix}_INCLUDE_DIR}")
endfunction()

function(nanochat_x_find_pcre2)
  nanochat_x_library(pcre2 pcre2.h "PCRE2 (8 bit)" libpcre2-dev pcre2 pcre2 pcre2-8 pcre2-8-static)
  set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
  if(TARGET nanochat_x_deps::pcre2 AND NANOCHAT_X_PCRE2_LIBRARY MATCHES "-static|\\.a$")
    target_compile_definitions(nanochat_x_deps::pcre2 INTERFACE PCRE2_STATIC)
  endif()
endfunction()

function(nanochat_x_find_openssl)
  if(APPLE AND NOT OPENSSL_ROOT_DIR)  # brew keeps it out of the folders that are searched
    find_path(NANOCHAT_X_OPENSSL_ROOT include/openssl/evp.h PATHS /opt/homebrew/opt/openssl@3 /usr/local/opt/openssl@3)
    mark_as_advanced(NANOCHAT_X_OPENSSL_ROOT)
    if(NANOCHAT_X_OPENSSL_ROOT)
      set(OPENSSL_ROOT_DIR "${NANOCHAT_X_OPENSSL_ROOT}")
    endif()
  endif()
  find_package(OpenSSL QUIET COMPONENTS Crypto)
  # Debian keeps opensslconf.h, which evp.h includes, in a folder of the architecture's own: only the compiler's built-in
  # paths name it, which is not enough for a package that was unpacked elsewhere.
  find_path(NANOCHAT_X_OPENSSL_CONFIG_DIR openssl/opensslconf.h HINTS "${OPENSSL_INCLUDE_DIR}")
  mark_as_advanced(NANOCHAT_X_OPENSSL_CONFIG_DIR)
  if(NOT TARGET OpenSSL::Crypto OR NOT NANOCHAT_X_OPENSSL_CONFIG_DIR)
    nanochat_x_missing("OpenSSL (libcrypto)" libssl-dev openssl@3 openssl)
    set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
    return()
  endif()
  add_library(nanochat_x_deps::crypto INTERFACE IMPORTED)
  target_link_libraries(nanochat_x_deps::crypto INTERFACE OpenSSL::Crypto)
  target_include_directories(nanochat_x_deps::crypto INTERFACE "${NANOCHAT_X_OPENSSL_CONFIG_DIR}")
endfunction()

# SIMD for the kernels, which all backends but ONNX's take: the rest does without it, so this is called where they are built.
# The archive is preferred, for a program with one library less to find.
function(nanochat_x_find_highway)
  if(TARGET nanochat_x_deps::highway)
    return()
  endif()
  nanochat_x_library(highway hwy/highway.h "Highway" libhwy-dev highway highway libhwy.a hwy)
  set(_nanochat_x_missing "${_nanochat_x_missing}" PARENT_SCOPE)
  if(TARGET nanochat_x_deps::highway AND NOT NANOCHAT_X_HIGHWAY_LIBRARY MATCHES "\\.(a|lib)$")
    target_compile_definitions(nanochat_x_deps::highway INTERFACE HWY_SHARED_DEFINE)
  endif()
endfunction()

# Ends configuring where something was missing.
function(nanochat_x_end_if_missing)
  if(_nanochat_x_missing)
    message(FATAL_ERROR "Libraries that the runners are built from were not found."
      "${_nanochat_x_missing}\n"
      "scripts/system-deps.sh brings them, without root too; elsewhere, put their folder on CMAKE_PREFIX_PATH.")
  endif()
endfunction()

find_package(Threads REQUIRED)
nanochat_x_find_pcre2()
nanochat_x_find_openssl()
if(NOT NANOCHAT_X_DEPENDENCIES_OF_LIBRARY)  # what only building takes
  nanochat_x_headers(json nlohmann/json.hpp "nlohmann_json" nlohmann-json3-dev nlohmann-json nlohmann-json)
  nanochat_x_headers(boost boost/multiprecision/cpp_int.hpp "Boost.Multiprecision" libboost-dev boost boost-multiprecision)
  nanochat_x_headers(cli11 CLI/CLI.hpp "CLI11" libcli11-dev cli11 cli11)
  if(NANOCHAT_X_TESTS)
    nanochat_x_headers(doctest doctest/doctest.h "doctest" doctest-dev doctest doctest)
    nanochat_x_find_highway()
  endif()
endif()

nanochat_x_end_if_missing()
