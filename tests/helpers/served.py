"""A server that echoes its prompts with log probabilities, in the form of vLLM's answers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM


def echo_of(model: torch.nn.Module) -> Callable[[dict], dict]:
    """What vLLM answers when it serves `model`: of each token its log probability, and of the most probable one."""

    @torch.no_grad()
    def answer(request: dict) -> dict:
        assert request["echo"] and request["return_tokens_as_token_ids"] and request["max_tokens"] == 1
        tokens = request["prompt"]
        told = model(torch.tensor([tokens])).logits[0].float().log_softmax(dim=-1)
        values, tops = [None], [None]
        for place, token in enumerate(tokens[1:]):
            values.append(float(told[place, token]))
            best = int(told[place].argmax())
            tops.append({f"token_id:{token}": values[-1], f"token_id:{best}": float(told[place, best])})
        last = int(told[-1].argmax())  # the one token that it goes on with
        values.append(float(told[-1, last]))
        tops.append({f"token_id:{last}": values[-1]})
        return {"choices": [{"logprobs": {"token_logprobs": values, "top_logprobs": tops}}]}

    return answer


def model_in_bf16(folder) -> torch.nn.Module:
    """As a server computes it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@contextmanager
def serving(models: dict[str, Callable[[dict], dict]]) -> Iterator[str]:
    """The address of a server of these models, each by what it answers to a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.answer(200, models[request["model"]](request))
            except ValueError as error:
                self.answer(400, {"message": str(error)})

        def answer(self, code, content):
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
