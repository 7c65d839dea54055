# CMake toolchain: the C++ suite for AArch64, built and run (qemu's user emulation) on another machine.
#
#   apt-get install g++-12-aarch64-linux-gnu qemu-user googletest
#   cmake -S tests/cpp -B build/cpp-aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake   (`make neon` does all of it)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

find_program(MMCA_AARCH64_CXX NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-12 REQUIRED)
find_program(MMCA_AARCH64_EMULATOR NAMES qemu-aarch64 qemu-aarch64-static REQUIRED)
set(CMAKE_CXX_COMPILER "${MMCA_AARCH64_CXX}")
set(CMAKE_CROSSCOMPILING_EMULATOR "${MMCA_AARCH64_EMULATOR};-L;/usr/aarch64-linux-gnu")

# Libraries and packages found here are this machine's, not the target's; programs are.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

if(EXISTS /usr/src/googletest)  # Debian's sources; else CMakeLists.txt fetches them
  set(FETCHCONTENT_SOURCE_DIR_GOOGLETEST /usr/src/googletest CACHE PATH "")
endif()
