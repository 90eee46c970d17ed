# The README's steps in a container: docker build -t cogtune .
# Run it with the cards and enough shared memory: docker run --gpus all --shm-size 8g -v "$PWD:/data" cogtune doctor
# (the last digits of the base image have to suit the driver; `cogtune doctor` says when they do not)
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /cogtune
COPY . .
RUN pip install --no-cache-dir -e ".[deepspeed,quant,demo]" -c constraints.txt
WORKDIR /data
ENTRYPOINT ["cogtune"]
CMD ["--help"]
