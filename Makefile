# make                 train_llama and test_llama, with what this machine has: it says what it found and what is missing
# make test            every test that runs here; the last line is `N passed, N failed`
# make bench           times of the operations and of a training step
# Options: CUDA=0|1  PRECISION=BF16|FP32  SAN=1 (AddressSanitizer and UBSan, CPU)  ARCH=native|x86-64-v3|...  NVCC=path
#          MPI=0 (one process, although mpicc is here)  NCCL_HOME=folder with include/nccl.h and lib/
# Nothing is downloaded.

PRECISION ?= BF16
SAN ?= 0
ARCH ?= native
CXX := $(if $(filter default undefined,$(origin CXX)),g++,$(CXX))

# --- what is here ------------------------------------------------------------------------------------------------------
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
ifeq ($(SAN),1)
  CUDA := 0
endif
CUDA ?= $(if $(NVCC),1,0)
ifneq ($(filter-out 0 1,$(CUDA))$(filter-out BF16 FP32,$(PRECISION))$(filter-out 0 1,$(SAN)),)
  $(error CUDA is 0 or 1, PRECISION is BF16 or FP32, SAN is 0 or 1)
endif
ifeq ($(CUDA)$(NVCC),1)
  $(error CUDA=1, but no nvcc was found; set NVCC=/path/to/nvcc or CUDA=0)
endif

# MPI: what mpicc would add. -Wl,... becomes -Xlinker, which nvcc and g++ both take.
MPI ?= 1
MPICC := $(if $(filter 1,$(MPI)),$(shell command -v mpicc 2>/dev/null))
MPI_COMPILE := $(if $(MPICC),$(shell $(MPICC) --showme:compile 2>/dev/null || $(MPICC) -compile_info 2>/dev/null || \
    pkg-config --cflags ompi 2>/dev/null))
MPI_LINK := $(if $(MPICC),$(shell $(MPICC) --showme:link 2>/dev/null || $(MPICC) -link_info 2>/dev/null || \
    pkg-config --libs ompi 2>/dev/null))
comma := ,
MPI_CFLAGS := $(patsubst -I%,-isystem %,$(filter -I%,$(MPI_COMPILE)))
MPI_LIBS := $(strip $(filter -L% -l%,$(MPI_LINK)) \
    $(subst $(comma), -Xlinker ,$(subst -Wl$(comma),-Xlinker ,$(filter -Wl%,$(MPI_LINK)))))
BLAS_LIBS := $(shell pkg-config --libs openblas 2>/dev/null)
BLAS_CFLAGS := $(shell pkg-config --cflags openblas 2>/dev/null)
ifeq ($(BLAS_LIBS),)
  BLAS_LIBS := $(shell for lib in openblas cblas blas; do \
      printf '\#include <cblas.h>\nint main(){cblas_sgemm(CblasRowMajor,CblasNoTrans,CblasNoTrans,1,1,1,1,0,1,0,1,0,0,1);}\n' | \
      $(CXX) -x c++ - -l$$lib -o /dev/null 2>/dev/null && { echo -l$$lib; break; }; done)
endif
OPENMP := $(shell echo 'int main(){}' | $(CXX) -fopenmp -x c++ - -o /dev/null 2>/dev/null && echo -fopenmp)
CUDA_ROOT := $(if $(NVCC),$(patsubst %/bin/nvcc,%,$(realpath $(NVCC))))
NCCL := $(firstword $(wildcard $(NCCL_HOME)/include/nccl.h $(CUDA_ROOT)/include/nccl.h /usr/include/nccl.h))
NCCL_ROOT := $(patsubst %/include/nccl.h,%,$(NCCL))
GPU := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)

# --- flags --------------------------------------------------------------------------------------------------------------
# No -ffast-math: it deletes NaN tests. No contraction of a*b+c: results are pinned to the bit.
WARN := -Wall -Wextra -Wno-unused-function
FLAGS := -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -march=$(ARCH) $(OPENMP) -pthread $(WARN)
DEFS := $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) $(if $(BLAS_LIBS),-DUSE_BLAS $(BLAS_CFLAGS)) \
        $(if $(MPI_LIBS),-DUSE_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(MPI_CFLAGS))
LIBS := $(BLAS_LIBS) $(MPI_LIBS) -lm
# NCCL starts over MPI and serves GPUs
USE_NCCL := $(if $(and $(filter 1,$(CUDA)),$(MPI_LIBS),$(NCCL)),1)
ifeq ($(SAN),1)
  FLAGS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined \
           -ffp-contract=off -march=$(ARCH) $(OPENMP) -pthread $(WARN)
endif
# The GPU that is here, or one image per architecture generation where there is none. From 9.0 on with the "a": nvcc's own
# -arch=native means sm_90, which has no wgmma.
GPU_ARCH := $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1))
GPU_ARCH := $(GPU_ARCH)$(if $(filter 90 100 103 120 121,$(GPU_ARCH)),a)
CUDA_ARCHS ?= $(if $(GPU_ARCH),$(GPU_ARCH),80 89 90a 100a 103a 120a 121a)
GENCODE := $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a))

ifeq ($(CUDA),1)
  COMPILE = $(NVCC) -std=c++20 -O3 $(GENCODE) --threads 0 -x cu -DUSE_CUDA $(DEFS) \
            $(if $(USE_NCCL),-DUSE_NCCL -isystem $(NCCL_ROOT)/include) -Xcompiler "$(FLAGS)" -diag-suppress 177
  LINK = $(LIBS) -lcublasLt -lgomp $(if $(USE_NCCL),-L$(NCCL_ROOT)/lib -Xlinker -rpath -Xlinker $(NCCL_ROOT)/lib -lnccl)
else
  COMPILE = $(CXX) -x c++ -std=c++20 $(FLAGS) $(DEFS)
  LINK = -x none $(LIBS)
endif

BUILD := build/$(PRECISION)$(if $(filter 1,$(CUDA)),-cuda)$(if $(filter 1,$(SAN)),-san)
HEADERS := $(wildcard llmc/*.h llmc/cpu/*.h llmc/cuda/*.cuh) Makefile
TESTS := $(wildcard dev/test/*.h)

.PHONY: all found test bench clean help deps FORCE
.SUFFIXES:
all: found train_llama test_llama

found:
	@echo "compiler  $(shell $(CXX) --version 2>/dev/null | head -1)"
	@echo "nvcc      $(if $(NVCC),$(NVCC)$(if $(filter 0,$(CUDA)), (not used: CUDA=0)),missing: CPU only. The CUDA Toolkit has it)"
	@echo "GPU       $(if $(GPU),$(GPU),none visible)$(if $(filter 1,$(CUDA)),: compiling for sm_$(subst $() $(), sm_,$(CUDA_ARCHS)))"
	@echo "BLAS      $(if $(BLAS_LIBS),$(BLAS_LIBS),missing: slow loops instead. apt-get install libopenblas-dev)"
	@echo "OpenMP    $(if $(OPENMP),$(OPENMP),missing: one thread)"
	@echo "MPI       $(if $(MPI_LIBS),$(MPICC),missing: one process a run. apt-get install libopenmpi-dev openmpi-bin)"
	@echo "NCCL      $(if $(USE_NCCL),$(NCCL),$(if $(NCCL),$(NCCL) (not used: it needs CUDA=1 and MPI),missing: one GPU a run))"
	@echo "building  PRECISION=$(PRECISION) CUDA=$(CUDA) SAN=$(SAN) in $(BUILD)"

# recompile when the command line of the compiler changes
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(COMPILE) $(LINK)' | cmp -s - $@ || echo '$(COMPILE) $(LINK)' > $@

$(BUILD)/train_llama: train_llama.cu $(HEADERS) $(BUILD)/flags
	$(COMPILE) $< -o $@.tmp $(LINK)
	@mv $@.tmp $@
$(BUILD)/test_llama: test_llama.cu train_llama.cu $(HEADERS) $(TESTS) $(BUILD)/flags
	$(COMPILE) $< -o $@.tmp $(LINK)
	@mv $@.tmp $@

# the binaries people start are copies of the last configuration built
train_llama test_llama: %: $(BUILD)/% FORCE
	@cmp -s $< $@ || cp -f $< $@

deps:
	@./scripts/install_deps.sh

test:
	@./dev/test/run.sh PRECISION=$(PRECISION) CUDA=$(CUDA) SAN=$(SAN) ARCH=$(ARCH)

bench: all
	./train_llama --bench --model 30m --layers 2

clean:
	rm -rf build train_llama test_llama

help:
	@sed -n '1,7s/^# //p' Makefile
