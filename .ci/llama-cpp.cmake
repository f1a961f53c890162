# Read by the build of llama-cpp-python (see Makefile): half of what it compiles is a library that it never loads.
set(LLAMA_BUILD_COMMON OFF)
