# GoogleTest as GTest::gtest and GTest::gtest_main: the system's, or fetched.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  message(STATUS "GoogleTest is not installed (Debian: libgtest-dev), so it is fetched")  # cpp_suites.py reads this
  include(FetchContent)
  set(INSTALL_GTEST OFF CACHE INTERNAL "")
  FetchContent_Declare(googletest GIT_REPOSITORY https://github.com/google/googletest.git GIT_TAG v1.17.0 GIT_SHALLOW ON)
  FetchContent_MakeAvailable(googletest)
endif()
