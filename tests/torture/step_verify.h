// What must hold after a kill, looked at by the survivor.
#pragma once

#include <string>

#include "step_operations.h"

namespace torchshm::torture {

// Empty, or what is wrong. In the end the survivor has let go of everything.
// variant: what the survivor does first. 0: it reaps. 1: it works, without looking for the dead. 2: somebody joins.
std::string verify(Scene& scene, unsigned variant);
// The same where `alive` other processes live on: only looks, and reaps.
std::string verify_beside(Scene& scene, size_t alive);

}  // namespace torchshm::torture
