"""An OpenAI-compatible server in this process."""

import json
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(answer):
    """An OpenAI-compatible server; `answer(request body, number of this request)` gives (status, headers, text) or seconds to hang.

    A dict for a text is the choice as it is, with its `usage` beside; bytes are the whole body."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real servers do

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(body)
                number = len(requests)
            result = answer(body, number)
            if isinstance(result, float):
                time.sleep(result)
                return
            status, headers, text = result
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = None
            if isinstance(text, dict):
                usage = text.get("usage")
                choice |= {key: value for key, value in text.items() if key != "usage"}
            full = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
            data = text
            if not isinstance(text, bytes):
                data = json.dumps(full if status == 200 and headers is not None else {"error": {"message": text}}).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=partial(http.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
