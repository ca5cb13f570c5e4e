// csrc/cuda/nasa.cu's functions, on the host. They take host pointers.
#pragma once

#include "../cuda/nasa_params.h"

extern "C" int snoopi_nasa_emulated(const snoopi::NasaParams* params, int dtype, int head_dim,
                                    void* stream);
extern "C" int snoopi_nasa_emulated_projects(const snoopi::NasaParams* params, int dtype,
                                             int head_dim, int c_out);
extern "C" int snoopi_nasa_emulated_projects_on(const snoopi::NasaParams* params, int dtype,
                                                int head_dim, int c_out, int processors,
                                                int capability);
extern "C" const char* snoopi_nasa_emulated_error(int error);
extern "C" int snoopi_nasa_emulated_query(const snoopi::NasaParams* params, int dtype, int head_dim,
                                          int shared_limit, snoopi::NasaInstance* found);
