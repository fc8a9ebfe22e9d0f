# Both commands of the README in a container:
#
#   docker build -t netllm .
#   docker run --rm -v "$PWD/reports:/netllm/reports" netllm
#
# For NetLLM's own data: docker run … -v /path/to/data:/data netllm make demo DATA=/data
FROM python:3.11

WORKDIR /netllm
# what the environments are made of comes first, so that a change of the code does not make them again
COPY Makefile pyproject.toml requirements-*.txt README.md LICENSE ./
COPY netllm_lib/__init__.py netllm_lib/
RUN make env env-tf
COPY . .
CMD ["make", "test", "demo"]
