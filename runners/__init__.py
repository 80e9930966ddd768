"""The C++ sources of the runner programs; this file makes them installable as data of `nanochat_x.runners`.

`nanochat_x.build` compiles them with CMake. There is no Python code here.
"""
