"""Who is let in over an encrypted door: port, token of a member."""

import sys

import redis

port, token = int(sys.argv[1]), sys.argv[2]


def connect(password):
    return redis.Redis("127.0.0.1", port=port, password=password, ssl=True, socket_timeout=20)


assert connect(token).ping()
for wrong in ("nonsense", token[:-4] + "AAAA", None):
    try:
        connect(wrong).exists("x")
        raise AssertionError("a stranger came in")
    except redis.exceptions.RedisError as error:
        text = str(error)
        assert "invalid jwt" in text or "permission denied" in text, text

from zeroos.core0.client import Client

cl = Client("127.0.0.1", port=port, password=token, ssl=True, timeout=60)
assert cl.ping().startswith("PONG Version: ")
print("ALL FINE")
