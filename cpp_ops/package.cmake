# What a C or C++ program needs to compile against the installed library: its C interface, a CMake package and a
# pkg-config file, all of them relative to where they lie.

foreach(_header c_api.h embedding_bag/args.h embedding_bag_grad/args.h quantize/args.h)
  get_filename_component(_folder "${_header}" DIRECTORY)
  install(FILES "${_header}" DESTINATION "lucid_onnx/include/lucid_onnx/${_folder}")
endforeach()

set(_lucid_library "${CMAKE_SHARED_LIBRARY_PREFIX}lucid_onnx_ops${CMAKE_SHARED_LIBRARY_SUFFIX}")
set(_lucid_import_library "")
if(WIN32)
  set(_lucid_library lucid_onnx_ops.dll)
  set(_lucid_import_library "${CMAKE_IMPORT_LIBRARY_PREFIX}lucid_onnx_ops${CMAKE_IMPORT_LIBRARY_SUFFIX}")
endif()
set(_lucid_package "${CMAKE_CURRENT_BINARY_DIR}/package")
configure_file(package/lucid_onnx-config.cmake.in "${_lucid_package}/lucid_onnx-config.cmake" @ONLY)
configure_file(package/lucid_onnx.pc.in "${_lucid_package}/lucid_onnx.pc" @ONLY)
include(CMakePackageConfigHelpers)
write_basic_package_version_file("${_lucid_package}/lucid_onnx-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${_lucid_package}/lucid_onnx-config.cmake" "${_lucid_package}/lucid_onnx-config-version.cmake"
  DESTINATION lucid_onnx/lib/cmake/lucid_onnx)
install(FILES "${_lucid_package}/lucid_onnx.pc" DESTINATION lucid_onnx/lib/pkgconfig)
