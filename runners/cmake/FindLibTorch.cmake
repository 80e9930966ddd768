# Finds libtorch as the torch wheel (or a libtorch archive) has it and makes the target nanochat_x_deps::torch.
#
# Not find_package(Torch): that asks for MKL and, with a CUDA wheel, for a whole CUDA toolkit to be installed, and takes
# more than running a compiled model needs. Here it is headers, libtorch_cpu and libc10; never libtorch_python.
#
# CMAKE_PREFIX_PATH holds torch's folder (<site-packages>/torch) or what `torch.utils.cmake_prefix_path` says
# (<site-packages>/torch/share/cmake). Sets LibTorch_FOUND and LibTorch_VERSION.

set(_up "../..")  # from share/cmake to torch's folder
find_path(LIBTORCH_INCLUDE_DIR torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h
  HINTS "${Torch_DIR}/../../../include" PATH_SUFFIXES include ${_up}/include)
if(LIBTORCH_INCLUDE_DIR)
  # The libraries of those headers, and no others that may lie on the way
  get_filename_component(_root "${LIBTORCH_INCLUDE_DIR}/.." ABSOLUTE)
  find_library(LIBTORCH_CPU_LIBRARY torch_cpu PATHS "${_root}/lib" NO_DEFAULT_PATH)
  find_library(LIBTORCH_C10_LIBRARY c10 PATHS "${_root}/lib" NO_DEFAULT_PATH)
  foreach(_header IN ITEMS torch/headeronly/version.h torch/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${LIBTORCH_INCLUDE_DIR}/${_header}" AND NOT LibTorch_VERSION)
      file(STRINGS "${LIBTORCH_INCLUDE_DIR}/${_header}" _lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]")
      string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
      list(JOIN _numbers "." LibTorch_VERSION)
    endif()
  endforeach()
endif()
mark_as_advanced(LIBTORCH_INCLUDE_DIR LIBTORCH_CPU_LIBRARY LIBTORCH_C10_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LIBTORCH_CPU_LIBRARY LIBTORCH_C10_LIBRARY LIBTORCH_INCLUDE_DIR VERSION_VAR LibTorch_VERSION)

if(LibTorch_FOUND AND NOT TARGET nanochat_x_deps::torch)
  add_library(nanochat_x_deps::c10 UNKNOWN IMPORTED)
  set_target_properties(nanochat_x_deps::c10 PROPERTIES IMPORTED_LOCATION "${LIBTORCH_C10_LIBRARY}")
  add_library(nanochat_x_deps::torch UNKNOWN IMPORTED)
  set_target_properties(nanochat_x_deps::torch PROPERTIES
    IMPORTED_LOCATION "${LIBTORCH_CPU_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${_root}/include;${_root}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES nanochat_x_deps::c10)
endif()
