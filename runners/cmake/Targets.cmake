# How this project's targets are made.

# nanochat_x_target(<target>): language, warnings, sanitizers, and arithmetic that is the same everywhere
function(nanochat_x_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  if(MSVC)
    target_compile_options(${target} PRIVATE /W4 /utf-8 /permissive- /fp:precise $<$<BOOL:${NANOCHAT_X_WERROR}>:/WX>)
    target_compile_definitions(${target} PRIVATE _CRT_SECURE_NO_WARNINGS)
  else()
    # No fused multiply-add that the source does not ask for: the same logits give the same token on every machine.
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wconversion -Wshadow -ffp-contract=off
      $<$<BOOL:${NANOCHAT_X_WERROR}>:-Werror>)
  endif()
  if(NANOCHAT_X_SANITIZE)
    list(JOIN NANOCHAT_X_SANITIZE "," sanitizers)
    target_compile_options(${target} PRIVATE
      -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
    target_link_options(${target} PUBLIC -fsanitize=${sanitizers})
  endif()
endfunction()

# nanochat_x_program(<name> <libraries to link>... SOURCES <file>...)
function(nanochat_x_program name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" SOURCES)
  add_executable(${name} ${arg_SOURCES})
  target_compile_definitions(${name} PRIVATE NANOCHAT_X_VERSION="${PROJECT_VERSION}")
  nanochat_x_target(${name})
  target_link_libraries(${name} PRIVATE ${arg_UNPARSED_ARGUMENTS})
endfunction()

# nanochat_x_find_runtime(<SWITCH> <package> <how to get it>): the option NANOCHAT_X_<SWITCH> - AUTO (build the backend
# where its runtime is found), ON (it must be found), OFF - and NANOCHAT_X_<SWITCH>_FOUND: whether to build it. A macro,
# as find_package sets variables.
macro(nanochat_x_find_runtime switch package remedy)
  set(NANOCHAT_X_${switch} AUTO CACHE STRING "The ${switch} backend: AUTO (where ${package} is found), ON, OFF")
  set_property(CACHE NANOCHAT_X_${switch} PROPERTY STRINGS AUTO ON OFF)
  if(NOT NANOCHAT_X_${switch} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "  NANOCHAT_X_${switch} is ${NANOCHAT_X_${switch}}, not AUTO, ON or OFF")
  endif()
  set(NANOCHAT_X_${switch}_FOUND OFF)
  if(NOT NANOCHAT_X_${switch} STREQUAL "OFF")
    find_package(${package} QUIET)
    if(${package}_FOUND)
      set(NANOCHAT_X_${switch}_FOUND ON)
      string(TOLOWER ${switch} _backend)
      list(APPEND NANOCHAT_X_RUNTIMES ${_backend}=${package})
      message(STATUS "nanochat_x: backend ${switch} with ${package} ${${package}_VERSION}")
    elseif(NANOCHAT_X_${switch} STREQUAL "ON")
      message(FATAL_ERROR "  ${package} was not found: ${remedy}")  # (indented, or CMake would break the line)
    else()
      message(STATUS "nanochat_x: no backend ${switch}, ${package} was not found: ${remedy}")
    endif()
  endif()
endmacro()

# nanochat_x_backend(<target> <its runtime>...): the library nanochat_x::<target> of backends/<target>.cpp, the program
# nanochat-<target>, and the example of embedding it
function(nanochat_x_backend name)
  add_library(nanochat_x_${name}_code STATIC backends/${name}.cpp)
  nanochat_x_target(nanochat_x_${name}_code)
  target_link_libraries(nanochat_x_${name}_code PUBLIC nanochat_x_core PRIVATE ${ARGN})
  set(NANOCHAT_X_BACKENDS ${NANOCHAT_X_BACKENDS} ${name} PARENT_SCOPE)

  # The core calls open_backend, which the backend defines: all of it is linked, whatever the order of the libraries.
  add_library(nanochat_x_${name} INTERFACE)
  add_library(nanochat_x::${name} ALIAS nanochat_x_${name})
  target_link_libraries(nanochat_x_${name}
    INTERFACE "$<LINK_LIBRARY:WHOLE_ARCHIVE,nanochat_x_${name}_code>" nanochat_x_core)

  if(PROJECT_IS_TOP_LEVEL)
    nanochat_x_program(nanochat-${name} nanochat_x_app nanochat_x_${name} SOURCES app/main.cpp)
    nanochat_x_install_program(nanochat-${name})
    nanochat_x_install_library(${name} nanochat_x_${name}_code)
    nanochat_x_program(embed-${name} nanochat_x_${name} SOURCES examples/embed.cpp)
  endif()
endfunction()
