// What this binary was built from: setup.py writes the definition next to the objects.
#pragma once

namespace mmca {
const char* build_info_json();
}
