# All machine flags of the project. A source file named *_<isa>.cc is the only thing that gets them;
# everything else must run on any CPU of the architecture.

if(CMAKE_OSX_ARCHITECTURES)
  set(_lucid_arch "${CMAKE_OSX_ARCHITECTURES}")
else()
  set(_lucid_arch "${CMAKE_SYSTEM_PROCESSOR}")
endif()

# lucid_isa_sources(<out> <stem>): the <stem>_<isa>.cc of every instruction set of this architecture.
function(lucid_isa_sources out stem)
  set(isas baseline)
  if(_lucid_arch MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND isas avx2 avx512)
  elseif(_lucid_arch MATCHES "^(aarch64|arm64|ARM64)$")
    list(APPEND isas neon)
  endif()

  if(MSVC)
    set(avx2 /arch:AVX2)
    set(avx512 /arch:AVX512)
  else()
    set(avx2 -mavx2 -mf16c)
    set(avx512 -mavx2 -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  endif()

  set(sources)
  foreach(isa IN LISTS isas)
    set(source "${stem}_${isa}.cc")
    list(APPEND sources "${source}")
    set(flags ${${isa}})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # "The ABI for passing 64-byte vectors has changed": none is passed, all is inlined.
      list(APPEND flags -Wno-psabi)
      # As fast as -O3 here, in nine tenths of the time and of the bytes.
      list(APPEND flags "$<$<CONFIG:Release>:-O2>" "$<$<CONFIG:Release>:-funswitch-loops>")
    endif()
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
  set(${out} "${sources}" PARENT_SCOPE)
  list(JOIN isas ", " names)
  set(LUCID_ISAS "${names}" CACHE INTERNAL "What the CPU kernels are compiled for")
endfunction()
