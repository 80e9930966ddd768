# `cmake --install`: libraries, headers, programs and a CMake package, so that another project can say
#
#   find_package(nanochat_x REQUIRED COMPONENTS aoti)
#   target_link_libraries(my_program PRIVATE nanochat_x::aoti)
#
# A component is a backend; its runtime is looked for when it is asked for, first where it was found for this build.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(NANOCHAT_X_PACKAGE_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/nanochat_x")

# nanochat_x_install_library(<component> <target>...): the archives, and their targets file in the package
function(nanochat_x_install_library component)
  foreach(target IN LISTS ARGN)
    string(REPLACE "nanochat_x_" "" exported ${target})
    set_target_properties(${target} PROPERTIES EXPORT_NAME ${exported})
    install(TARGETS ${target} EXPORT nanochat_x-${component} ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  endforeach()
  install(EXPORT nanochat_x-${component} NAMESPACE nanochat_x:: DESTINATION "${NANOCHAT_X_PACKAGE_DIR}"
    FILE nanochat_x-${component}.cmake)
endfunction()

# nanochat_x_install_program(<target>): it finds its runtime's libraries where they were found for this build
function(nanochat_x_install_program target)
  set_target_properties(${target} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS ${target} RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endfunction()

# nanochat_x_install_package(): headers, and the files that find_package reads
function(nanochat_x_install_package)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/nanochat_x" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/nanochat_xConfig.cmake.in" nanochat_xConfig.cmake
    INSTALL_DESTINATION "${NANOCHAT_X_PACKAGE_DIR}")
  write_basic_package_version_file(nanochat_xConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  file(GLOB modules CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/Find*.cmake")
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/nanochat_xConfig.cmake"
    "${CMAKE_CURRENT_BINARY_DIR}/nanochat_xConfigVersion.cmake"
    "${PROJECT_SOURCE_DIR}/cmake/Dependencies.cmake" ${modules}
    DESTINATION "${NANOCHAT_X_PACKAGE_DIR}")
endfunction()
