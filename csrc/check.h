// Argument checks of the torch-free layer. The Python side checks first and in more words; these
// stand between a wrong call and memory that is not ours.
#pragma once

#include <sstream>
#include <stdexcept>

// Throws std::invalid_argument (ValueError in Python) naming the argument, what was wanted and what
// came:
//   USERIP_CHECK(dim > 0, "dim", "a positive count", dim);
#define USERIP_CHECK(condition, name, wanted, got)                             \
    do {                                                                       \
        if (!(condition)) {                                                    \
            std::ostringstream message;                                        \
            message << (name) << ": wanted " << (wanted) << ", got " << (got); \
            throw std::invalid_argument(message.str());                        \
        }                                                                      \
    } while (false)
