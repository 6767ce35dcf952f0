#include "pool/ledger.h"

#include "pool/ledger_impl.h"
#include "pool/membership.h"

namespace torchshm::pool {

template class BasicLedger<Arena>;

}  // namespace torchshm::pool
