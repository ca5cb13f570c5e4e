#include "nasa_emu.h"

#include "../cuda/nasa_launch.h"

int snoopi_nasa_emulated(const snoopi::NasaParams* params, int dtype, int head_dim, void* stream) {
  return snoopi::nasa_launch(*params, dtype, head_dim, stream);
}

int snoopi_nasa_emulated_query(const snoopi::NasaParams* params, int dtype, int head_dim,
                               int shared_limit, snoopi::NasaInstance* found) {
  return snoopi::nasa_query(*params, dtype, head_dim, shared_limit, found);
}
