#include "nasa_emu.h"

#include "../cuda/nasa_launch.h"

int snoopi_nasa_emulated(const snoopi::NasaParams* params, int dtype, int head_dim, void* stream) {
  return snoopi::nasa_launch(*params, dtype, head_dim, stream);
}

int snoopi_nasa_emulated_projects(const snoopi::NasaParams* params, int dtype, int head_dim,
                                  int c_out) {
  return snoopi::nasa_projects(*params, dtype, head_dim, c_out);
}

int snoopi_nasa_emulated_projects_on(const snoopi::NasaParams* params, int dtype, int head_dim,
                                     int c_out, int processors, int capability) {
  return snoopi::projects_well(*params, dtype, head_dim, c_out, processors, capability);
}

const char* snoopi_nasa_emulated_error(int error) { return snoopi::nasa_error_text(error); }

int snoopi_nasa_emulated_query(const snoopi::NasaParams* params, int dtype, int head_dim,
                               int shared_limit, snoopi::NasaInstance* found) {
  return snoopi::nasa_query(*params, dtype, head_dim, shared_limit, found);
}
