# Build Horovod 0.28.1 as the C++ that torch needs: its CMakeLists.txt sets 14, torch 2.1 to 2.13 needs 17, later ones 20.
# The environment variable HOROVOD_CXX_STANDARD says which (default 17).
#
# Not a real toolchain, only a hook: CMake >= 3.21 takes the path of this file from the environment
# variable CMAKE_TOOLCHAIN_FILE, so Horovod's source stays as released.
if(CMAKE_CXX_COMPILER_LOADED AND PROJECT_NAME STREQUAL "horovod")
  # Second pass: included right after project(horovod CXX).
  # GCC >= 13 needs two headers that 0.28.1 forgets; -g0 saves 35 MB in the wheel.
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include stdexcept -include string -g0>")
  # Without the C++ bindings of Open MPI 4, which nothing uses, the wheel loads with Open MPI 5 too.
  add_compile_definitions(OMPI_SKIP_MPICXX=1 MPICH_SKIP_MPICXX=1)
  add_link_options("LINKER:--as-needed")
  set(_standard 17)
  if(DEFINED ENV{HOROVOD_CXX_STANDARD})
    set(_standard $ENV{HOROVOD_CXX_STANDARD})
  endif()
  function(_horovod_cxx)
    foreach(_target pytorch gloo)  # gloo too, or the link finds a symbol twice
      if(TARGET ${_target})
        set_property(TARGET ${_target} PROPERTY CXX_STANDARD ${_standard})
        message(STATUS "horovod: target ${_target} is built as C++${_standard}")
      endif()
    endforeach()
    if(TARGET pytorch)
      # From site-packages/horovod/torch to the lib of the environment: an MPI, and an NCCL, that pip installed.
      set_property(TARGET pytorch APPEND PROPERTY BUILD_RPATH
        "\$ORIGIN/../../../.." "\$ORIGIN/../../torch/lib" "\$ORIGIN/../../nvidia/nccl/lib")
    endif()
  endfunction()
  cmake_language(DEFER CALL _horovod_cxx)
else()
  # First passes: the toolchain file itself, also in the projects of try_compile.
  set(CMAKE_PROJECT_horovod_INCLUDE "${CMAKE_CURRENT_LIST_FILE}")
endif()
