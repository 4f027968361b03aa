# Whether there is a CUDA compiler that works, and its flags. Sets LUCID_BUILD_CUDA.

set(LUCID_BUILD_CUDA OFF)
if(NOT LUCID_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LUCID_CUDA = ${LUCID_CUDA} is not AUTO, ON or OFF")
endif()

# Machine code for T4 (and all else of 7.5 to 7.9), A100, H100 and B200, and PTX of the last one for
# what comes after. Older compilers know fewer.
set(LUCID_CUDA_ARCHITECTURES "" CACHE STRING "CUDA architectures; empty: 75, 80, 90, 100 and PTX, as the compiler has them")

if(NOT LUCID_CUDA STREQUAL "OFF")
  set(_why "")
  if(LUCID_SANITIZE)
    set(_why "LUCID_SANITIZE is set")
  elseif(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    set(_why "the CUDA kernels are built on Linux only")
  else()
    # Where it cannot compile a program, this leaves CMAKE_CUDA_COMPILER empty. An architecture must
    # be named, or the check asks for a GPU on this machine; every compiler has this one.
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80)
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      enable_language(CUDA)
      find_package(CUDAToolkit QUIET)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
        set(_why "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 11.8")
      elseif(NOT TARGET CUDA::cudart_static)
        set(_why "there is no libcudart_static.a")
      else()
        set(LUCID_BUILD_CUDA ON)
      endif()
    else()
      set(_why "no nvcc was found that compiles; CUDACXX may name one")
    endif()
  endif()
  if(NOT LUCID_BUILD_CUDA AND LUCID_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LUCID_CUDA = ON, but ${_why}")
  elseif(NOT LUCID_BUILD_CUDA)
    message(STATUS "Without the CUDA kernels: ${_why}")
  endif()
endif()

# The gradient sorts with CUB, whose headers come with the toolkit, in a folder of their own from 13.0
# on that nvcc knows. A toolkit without them still builds all other kernels.
set(LUCID_CUDA_CUB OFF)
if(LUCID_BUILD_CUDA)
  foreach(_folder IN LISTS CUDAToolkit_INCLUDE_DIRS)
    if(EXISTS "${_folder}/cub/device/device_radix_sort.cuh" OR
       EXISTS "${_folder}/cccl/cub/device/device_radix_sort.cuh")
      set(LUCID_CUDA_CUB ON)
    endif()
  endforeach()
  if(NOT LUCID_CUDA_CUB)
    message(STATUS "Without the CUDA kernels of gradients: no CUB in ${CUDAToolkit_INCLUDE_DIRS}")
  endif()
endif()

function(lucid_cuda_flags target)
  set(archs "${LUCID_CUDA_ARCHITECTURES}")
  if(NOT archs)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      set(archs 75-real 80-real 90)
    else()
      set(archs 75-real 80-real 90-real 100)
    endif()
  endif()
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_ARCHITECTURES "${archs}"
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # No fused multiply and add, for the bits of the CPU's kernel; two threads over the architectures.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-O3 --fmad=false --threads=2 -Xcompiler=-Wall,-Wextra,-ffp-contract=off>)
endfunction()
