# Finds onnxruntime and makes the target nanochat_x_deps::onnxruntime: the headers, and the macro
# NANOCHAT_X_ONNXRUNTIME with the path of the library, which the backend loads when it runs.
#
# Not linked: on Linux the library's one symbol carries its exact version, so that a program linked with one release
# would not start with any other, and the system's loader, not the program, would say so.
#
# The library: ONNXRUNTIME_ROOT (a CMake or environment variable; lib/), else the onnxruntime wheel, whose folder
# (<site-packages>/onnxruntime) is on CMAKE_PREFIX_PATH, else an installed package. The wheel has no headers: those are of
# ONNXRUNTIME_ROOT (include/), an installed package or what scripts/system-deps.sh unpacked, and may be older than the
# library, which serves older headers too. Sets OnnxRuntime_FOUND and OnnxRuntime_VERSION (of the library where its name
# tells, else of the headers).

set(_suffixes include include/onnxruntime include/onnxruntime/core/session)
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
  HINTS "${ONNXRUNTIME_ROOT}" ENV ONNXRUNTIME_ROOT PATH_SUFFIXES ${_suffixes} onnxruntime onnxruntime/core/session)

set(_name "${CMAKE_SHARED_LIBRARY_PREFIX}onnxruntime")
find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime HINTS "${ONNXRUNTIME_ROOT}" ENV ONNXRUNTIME_ROOT PATH_SUFFIXES lib
  NO_DEFAULT_PATH)
if(NOT ONNXRUNTIME_LIBRARY AND NOT ONNXRUNTIME_ROOT AND NOT DEFINED ENV{ONNXRUNTIME_ROOT})
  foreach(_prefix IN LISTS CMAKE_PREFIX_PATH)
    # The wheel's name for it has the version in it and none that a linker looks for.
    file(GLOB _libraries "${_prefix}/capi/${_name}.so.*" "${_prefix}/capi/${_name}.*dylib" "${_prefix}/capi/${_name}.dll")
    if(_libraries AND NOT ONNXRUNTIME_LIBRARY)
      list(GET _libraries 0 _library)
      set(ONNXRUNTIME_LIBRARY "${_library}" CACHE FILEPATH "The onnxruntime library that the ONNX backend loads" FORCE)
    endif()
  endforeach()
  find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime libonnxruntime.so.1)
endif()
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)

if(ONNXRUNTIME_LIBRARY)
  get_filename_component(_real "${ONNXRUNTIME_LIBRARY}" REALPATH)
  if(_real MATCHES "onnxruntime\\.(so\\.)?([0-9]+\\.[0-9]+(\\.[0-9]+)?)")
    set(OnnxRuntime_VERSION "${CMAKE_MATCH_2}")
  endif()
endif()
if(ONNXRUNTIME_INCLUDE_DIR AND NOT OnnxRuntime_VERSION)
  file(STRINGS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h" _line REGEX "#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE ".*ORT_API_VERSION ([0-9]+).*" "1.\\1" OnnxRuntime_VERSION "${_line}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
  REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR VERSION_VAR OnnxRuntime_VERSION)

if(OnnxRuntime_FOUND AND NOT TARGET nanochat_x_deps::onnxruntime)
  add_library(nanochat_x_deps::onnxruntime INTERFACE IMPORTED)
  target_include_directories(nanochat_x_deps::onnxruntime INTERFACE "${ONNXRUNTIME_INCLUDE_DIR}")
  target_compile_definitions(nanochat_x_deps::onnxruntime INTERFACE "NANOCHAT_X_ONNXRUNTIME=\"${_real}\"")
  target_link_libraries(nanochat_x_deps::onnxruntime INTERFACE ${CMAKE_DL_LIBS})
endif()
