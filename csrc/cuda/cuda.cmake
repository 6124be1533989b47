# How the CUDA backend is built.
#   GPTOSS_CUDA=AUTO     the default: for the cards that are there, where both a card and a compiler are found; else as OFF,
#                        saying why
#   GPTOSS_CUDA=ON       for GPTOSS_CUDA_ARCHITECTURES
#   GPTOSS_CUDA=OFF      a stub that says so when it is asked for
#   GPTOSS_CUDA=EMULATE  the same sources with the C++ compiler, run by csrc/cuda/emulator
# ON and AUTO with a card need CMake 3.25 and the CUDA toolkit 12.4, or newer; the rest is content with what the CPU needs.
set(GPTOSS_CUDA AUTO CACHE STRING "CUDA backend: AUTO, ON, OFF or EMULATE")
set(GPTOSS_CUDA_ARCHITECTURES "80-real;90a-real;120" CACHE STRING "CUDA architectures of GPTOSS_CUDA=ON")
set_property(CACHE GPTOSS_CUDA PROPERTY STRINGS AUTO ON OFF EMULATE)

# Sets gptoss_architectures to those of the cards of this machine that the backend runs on, or gptoss_why to why there is
# nothing to build. Looks for a card first: without one, no CUDA compiler is tried.
macro(gptoss_find_cards)
  set(gptoss_architectures "")
  find_program(GPTOSS_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(GPTOSS_NVIDIA_SMI)
  set(gptoss_caps "")
  if(GPTOSS_NVIDIA_SMI)
    execute_process(COMMAND ${GPTOSS_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE gptoss_caps ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  string(REGEX MATCHALL "[0-9]+[.][0-9]+" gptoss_caps "${gptoss_caps}")
  foreach(cap IN LISTS gptoss_caps)
    if(cap VERSION_GREATER_EQUAL 8.0)
      string(REPLACE "." "" cap "${cap}")
      string(REGEX REPLACE "^90$" "90a" cap "${cap}")
      list(APPEND gptoss_architectures ${cap})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES gptoss_architectures)
  if(NOT gptoss_architectures)
    set(gptoss_why "no card of compute capability 8.0 or newer found")
  elseif(CMAKE_VERSION VERSION_LESS 3.25)
    set(gptoss_why "there is a card, but CMake ${CMAKE_VERSION} is older than 3.25")
  else()
    include(CheckLanguage)
    check_language(CUDA)
    set(gptoss_release 0)
    if(CMAKE_CUDA_COMPILER)
      execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE gptoss_release ERROR_QUIET)
      string(REGEX REPLACE ".*release ([0-9.]+).*" "\\1" gptoss_release "${gptoss_release}")
    endif()
    if(NOT CMAKE_CUDA_COMPILER)
      set(gptoss_why "there is a card, but no CUDA compiler that works")
    elseif(gptoss_release VERSION_LESS 12.4)
      set(gptoss_why "there is a card, but ${CMAKE_CUDA_COMPILER} is not of CUDA 12.4 or newer")
    endif()
  endif()
endmacro()

set(gptoss_cuda ${GPTOSS_CUDA})
set(gptoss_why "")
if(gptoss_cuda STREQUAL "AUTO")
  gptoss_find_cards()
  set(gptoss_cuda ON)
  if(gptoss_why)
    set(gptoss_cuda OFF)
    set(gptoss_why " (${gptoss_why})")
  endif()
else()
  # 90 without the a has no wgmma, and the kernels that want it would stop.
  string(REGEX REPLACE "(^|;)90(;|-|$)" "\\190a\\2" gptoss_architectures "${GPTOSS_CUDA_ARCHITECTURES}")
endif()

set(gptoss_cuda_kernels csrc/cuda/attention.cu csrc/cuda/backend.cu csrc/cuda/device.cu csrc/cuda/failures.cu
  csrc/cuda/hopper.cu csrc/cuda/matmul.cu csrc/cuda/moe.cu csrc/cuda/operations.cu csrc/cuda/pointwise.cu csrc/cuda/sample.cu
  csrc/cuda/step.cu csrc/cuda/weights.cu)
if(gptoss_cuda STREQUAL "ON")
  if(CMAKE_VERSION VERSION_LESS 3.25)
    message(FATAL_ERROR "GPTOSS_CUDA=ON needs CMake 3.25 or newer, this is ${CMAKE_VERSION}")
  endif()
  message(STATUS "CUDA backend: for ${gptoss_architectures}")
  enable_language(CUDA)
  find_package(CUDAToolkit 12.4 REQUIRED)
  set(GPTOSS_CUDA_KIND "cuda ${CMAKE_CUDA_COMPILER_VERSION}")
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # a CMake that is older than the compiler
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  set(GPTOSS_CUDA_SOURCES $<TARGET_OBJECTS:gptoss_cuda>)
elseif(gptoss_cuda STREQUAL "EMULATE")
  message(STATUS "CUDA backend: emulated on the CPU")
  set(GPTOSS_CUDA_KIND "emulator")
  set(GPTOSS_CUDA_SOURCES $<TARGET_OBJECTS:gptoss_cuda> csrc/cuda/emulator/emulator.cpp csrc/cuda/emulator/hopper.cpp
    csrc/cuda/emulator/runtime.cpp)
elseif(gptoss_cuda STREQUAL "OFF")
  message(STATUS "CUDA backend: none${gptoss_why}")
  set(GPTOSS_CUDA_KIND "none")
  set(GPTOSS_CUDA_SOURCES csrc/cuda/no_cuda.cpp)
else()
  message(FATAL_ERROR "GPTOSS_CUDA must be AUTO, ON, OFF or EMULATE, not ${GPTOSS_CUDA}")
endif()

# An object library of CUDA sources: by nvcc, or by the C++ compiler for the emulator.
function(gptoss_add_cuda_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE csrc)
  if(gptoss_cuda STREQUAL "EMULATE")
    target_compile_definitions(${target} PRIVATE GPTOSS_CUDA_EMULATE)
    target_link_libraries(${target} PRIVATE gptoss_warnings)
    # No fusing that is not written out, as on the card.
    target_compile_options(${target} PRIVATE -ffp-contract=off -Wno-unknown-pragmas)
    set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS -xc++)
    return()
  endif()
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  set_property(TARGET ${target} PROPERTY CUDA_ARCHITECTURES ${gptoss_architectures})
  # No fusing that is not written out: it could differ between two kernels that must give the same bits. And ptxas reports the
  # registers, stack and spills of every kernel, in the build's output.
  target_compile_options(${target} PRIVATE -fmad=false -lineinfo -Xptxas=-v $<$<BOOL:${GPTOSS_WERROR}>:-Werror=all-warnings>)
endfunction()

if(NOT gptoss_cuda STREQUAL "OFF")
  gptoss_add_cuda_objects(gptoss_cuda ${gptoss_cuda_kernels})
endif()

function(gptoss_use_cuda target)
  if(gptoss_cuda STREQUAL "ON")
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)  # a module that loads where there is no driver
  elseif(gptoss_cuda STREQUAL "EMULATE")
    target_compile_definitions(${target} PRIVATE GPTOSS_CUDA_EMULATE)
  endif()
endfunction()
