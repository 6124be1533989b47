# How the CUDA backend is built.
#   GPTOSS_CUDA=AUTO     for the card that is there, where both a card and a compiler are found; else as OFF
#   GPTOSS_CUDA=ON       for GPTOSS_CUDA_ARCHITECTURES
#   GPTOSS_CUDA=OFF      a stub that says so when it is asked for
#   GPTOSS_CUDA=EMULATE  the same sources with the C++ compiler, run by csrc/cuda/emulator
set(GPTOSS_CUDA AUTO CACHE STRING "CUDA backend: AUTO, ON, OFF or EMULATE")
set(GPTOSS_CUDA_ARCHITECTURES "80-real;90a-real;120" CACHE STRING "CUDA architectures of GPTOSS_CUDA=ON")
set_property(CACHE GPTOSS_CUDA PROPERTY STRINGS AUTO ON OFF EMULATE)

set(gptoss_cuda ${GPTOSS_CUDA})
if(gptoss_cuda STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  find_program(GPTOSS_NVIDIA_SMI nvidia-smi)
  set(gptoss_cuda OFF)
  if(CMAKE_CUDA_COMPILER AND GPTOSS_NVIDIA_SMI)
    execute_process(COMMAND ${GPTOSS_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE gptoss_caps RESULT_VARIABLE gptoss_failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(gptoss_failed EQUAL 0 AND gptoss_caps MATCHES "^[0-9]")
      string(REPLACE "." "" gptoss_caps "${gptoss_caps}")
      string(REPLACE "\n" ";" gptoss_caps "${gptoss_caps}")
      list(REMOVE_DUPLICATES gptoss_caps)
      list(TRANSFORM gptoss_caps REPLACE "^90$" "90a")
      set(gptoss_cuda ON)
      set(gptoss_architectures ${gptoss_caps})
    endif()
  endif()
else()
  set(gptoss_architectures ${GPTOSS_CUDA_ARCHITECTURES})
endif()
message(STATUS "CUDA backend: ${gptoss_cuda} ${gptoss_architectures}")

set(gptoss_cuda_kernels csrc/cuda/attention.cu csrc/cuda/backend.cu csrc/cuda/matmul.cu csrc/cuda/moe.cu csrc/cuda/pointwise.cu
  csrc/cuda/weights.cu)
if(gptoss_cuda STREQUAL "ON")
  if(CMAKE_VERSION VERSION_LESS 3.25)
    message(FATAL_ERROR "GPTOSS_CUDA needs CMake 3.25 or newer, this is ${CMAKE_VERSION}")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit 12.4 REQUIRED)
  set(GPTOSS_CUDA_KIND "cuda ${CMAKE_CUDA_COMPILER_VERSION}")
  set(GPTOSS_CUDA_SOURCES ${gptoss_cuda_kernels})
elseif(gptoss_cuda STREQUAL "EMULATE")
  set(GPTOSS_CUDA_KIND "emulator")
  set(GPTOSS_CUDA_SOURCES ${gptoss_cuda_kernels} csrc/cuda/emulator/emulator.cpp)
elseif(gptoss_cuda STREQUAL "OFF")
  set(GPTOSS_CUDA_KIND "none")
  set(GPTOSS_CUDA_SOURCES csrc/cuda/no_cuda.cpp)
else()
  message(FATAL_ERROR "GPTOSS_CUDA must be AUTO, ON, OFF or EMULATE, not ${GPTOSS_CUDA}")
endif()

# The resource report of the kernels (registers, stack, shared memory) is kept as
# <build>/cuda_resources.txt where the toolkit has cuobjdump; else the build prints it.
function(gptoss_use_cuda target)
  if(gptoss_cuda STREQUAL "ON")
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${gptoss_architectures}" CUDA_RUNTIME_LIBRARY Static)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -lineinfo>)
    set(report ${CMAKE_CURRENT_BINARY_DIR}/cuda_resources.txt)
    find_program(GPTOSS_CUOBJDUMP cuobjdump HINTS ${CUDAToolkit_BIN_DIR})
    if(GPTOSS_CUOBJDUMP)
      add_custom_command(TARGET ${target} POST_BUILD
        COMMAND ${GPTOSS_CUOBJDUMP} --dump-resource-usage $<TARGET_FILE:${target}> > ${report}
        COMMENT "Registers and stack of every kernel: ${report}" VERBATIM)
    else()  # the build's own output has them
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
    endif()
  elseif(gptoss_cuda STREQUAL "EMULATE")
    target_compile_definitions(${target} PRIVATE GPTOSS_CUDA_EMULATE)
    # No fusing that is not written out, as on the card, where fmaf says so.
    set_source_files_properties(${gptoss_cuda_kernels} PROPERTIES LANGUAGE CXX
      COMPILE_OPTIONS "-xc++;-ffp-contract=off;-Wno-unknown-pragmas")
  endif()
endfunction()
