# Finds the C++ SDK in the executorch wheel and makes the target nanochat_x_deps::executorch: the runtime, the optimized
# kernels, XNNPACK and the thread pool; never the Python extension.
#
# CMAKE_PREFIX_PATH holds executorch's folder (<site-packages>/executorch). Its package needs CMake 3.28. Sets
# ExecuTorch_FOUND and ExecuTorch_VERSION.

set(_parts runtime kernels_optimized backend_xnnpack threadpool)
if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.28)
  set(_quiet "${CMAKE_MESSAGE_LOG_LEVEL}")
  set(CMAKE_MESSAGE_LOG_LEVEL WARNING)  # it tells about Python even when it is asked to be quiet
  find_package(executorch QUIET CONFIG COMPONENTS ${_parts})
  set(CMAKE_MESSAGE_LOG_LEVEL "${_quiet}")
  set(ExecuTorch_VERSION "${executorch_VERSION}")
endif()

set(_found TRUE)
foreach(_part IN LISTS _parts)
  if(NOT TARGET executorch::${_part})
    set(_found "")
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ExecuTorch REQUIRED_VARS executorch_DIR _found VERSION_VAR ExecuTorch_VERSION)

if(ExecuTorch_FOUND AND NOT TARGET nanochat_x_deps::executorch)
  add_library(nanochat_x_deps::executorch INTERFACE IMPORTED)
  foreach(_part IN LISTS _parts)
    target_link_libraries(nanochat_x_deps::executorch INTERFACE executorch::${_part})
  endforeach()
  target_compile_definitions(nanochat_x_deps::executorch
    INTERFACE NANOCHAT_X_EXECUTORCH_VERSION="${ExecuTorch_VERSION}")
endif()
