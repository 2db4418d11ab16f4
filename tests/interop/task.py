"""The inside of a `Task`: one JSON line in, `{"code", "values"}`; one out, `{"result"}` or `{"error"}`.

Variables stay from one snippet to the next.
"""

import json
import os
import sys
import traceback

# What libraries print must not come between the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

scope = {}
for line in sys.stdin:
    request = json.loads(line)
    scope.update(request["values"])
    scope["result"] = None
    try:
        exec(request["code"], scope)
        reply = json.dumps({"result": scope["result"]})
    except BaseException:  # whatever it is, the test has to see it
        reply = json.dumps({"error": traceback.format_exc()})
    answers.write(reply + "\n")
    answers.flush()
