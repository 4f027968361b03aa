# A CMake toolchain: zig's clang, of PyPI's `ziglang`, for another platform. LUCID_ZIG is the program zig and
# LUCID_ZIG_TARGET its name of the platform, such as aarch64-linux-gnu.2.17. tools/wheels.py uses it.

set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES LUCID_ZIG LUCID_ZIG_TARGET)
string(REGEX MATCH "^([^-]+)-([^-.]+)" _ "${LUCID_ZIG_TARGET}")
set(CMAKE_SYSTEM_PROCESSOR "${CMAKE_MATCH_1}")
set(_systems linux Linux macos Darwin windows Windows)
list(FIND _systems "${CMAKE_MATCH_2}" _at)
math(EXPR _at "${_at} + 1")
list(GET _systems ${_at} CMAKE_SYSTEM_NAME)

set(CMAKE_CXX_COMPILER "${LUCID_ZIG}" c++ -target "${LUCID_ZIG_TARGET}")
# zig writes debug information, with the paths of this machine, unless told not to.
set(CMAKE_CXX_FLAGS_INIT -g0)
foreach(_kind EXE SHARED MODULE)
  set(CMAKE_${_kind}_LINKER_FLAGS_INIT -s)
endforeach()
