"""Metal kernel text to C++: what no macro of include/metal_host.h can say is rewritten here.

Every newline is kept, so that errors name lines of the kernel.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUBS = HERE / "stubs"

TOKEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*"""
    r"""|\.?\d(?:[eEpP][+-]|[\w.])*|\s+|::|->|.""",
    re.S,
)

# Thread attributes of Metal and the field of the runtime's Thread that holds each.
VECTOR_ATTRIBUTES = {
    "thread_position_in_grid": "in_grid",
    "thread_position_in_threadgroup": "in_group",
    "threadgroup_position_in_grid": "group_pos",
    "threads_per_threadgroup": "group_size",
    "dispatch_threads_per_threadgroup": "full_group",
    "threads_per_grid": "grid",
    "grid_size": "grid",
    "threadgroups_per_grid": "groups",
}
SCALAR_ATTRIBUTES = {
    "grid_origin": "uint(0)",
    "thread_index_in_threadgroup": "t->index",
    "thread_index_in_simdgroup": "t->lane",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "dispatch_simdgroups_per_threadgroup": "t->full_simdgroups",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "t->index % 4",
    "quadgroup_index_in_threadgroup": "t->index / 4",
}


class MetalError(Exception):
    """A kernel that does not compile, does something wrong when it runs, or breaks a limit."""


def is_code(token: str) -> bool:
    return not token.isspace() and not token.startswith(("//", "/*"))


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += c
    return [p for p in [*parts, part] if p.strip()]


def inline_includes(
    text: str, roots: Iterable[str], seen: set[str], name: str = "kernel.metal"
) -> str:
    """Replace each #include "..." by the file, once; <metal_*> is include/metal_host.h."""
    out = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if include and include[1] == '"' and include[2] not in seen:
            seen.add(include[2])
            stub = STUBS / Path(include[2]).name
            found = [p for p in (stub, *(Path(r) / include[2] for r in roots)) if p.exists()]
            if not found:
                raise MetalError(f"{name}:{number}: no file {include[2]}")
            out.append(inline_includes(found[0].read_text(), roots, seen, include[2]))
            out.append(f'#line {number + 1} "{name}"')
        elif include or re.match(r"\s*#\s*pragma once", line):
            out.append("")
        else:
            out.append(line)
    return "\n".join(out)


def strip_attributes(text: str) -> str:
    """Drop every [[...]]: it may name words that are macros here, such as threadgroup."""
    tokens, out, i = TOKEN.findall(text), [], 0
    while i < len(tokens):
        if tokens[i : i + 2] == ["[", "["]:
            depth, end = 0, i
            while True:
                depth += (tokens[end] == "[") - (tokens[end] == "]")
                end += 1
                if depth == 0 or end == len(tokens):
                    break
            body = "".join(tokens[i:end])
            if re.match(r"\[\[\s*[a-z_]+\s*[,(\]]", body):
                out.append("".join(re.findall(r"\\?\n", body)))
                i = end
                continue
        out.append(tokens[i])
        i += 1
    return "".join(out)


def drop_qualified_members(text: str) -> str:
    """Keep the `thread` one of member functions overloaded by the address space of *this."""
    tokens, out, i = TOKEN.findall(text), [], 0
    while i < len(tokens):
        if tokens[i] in ("device", "constant", "threadgroup"):
            before = [t for t in out[-12:] if is_code(t)][-2:]
            after = next((t for t in tokens[i + 1 :] if is_code(t)), "")
            if after in ("{", ":") and before and (before[-1] == ")" or before == [")", "const"]):
                depth, start = 0, len(out)  # back to the beginning of the member
                while start and not (depth == 0 and out[start - 1] in (";", "{", "}")):
                    depth += (out[start - 1] == ")") - (out[start - 1] == "(")
                    start -= 1
                dropped = out[start:]
                del out[start:]
                depth, inside = 0, False  # and on to the end of its body
                while not (inside and depth == 0):
                    depth += (tokens[i] == "{") - (tokens[i] == "}")
                    inside = inside or tokens[i] == "{"
                    dropped.append(tokens[i])
                    i += 1
                out.append("\n" * "".join(dropped).count("\n"))
                continue
        out.append(tokens[i])
        i += 1
    return "".join(out)


def storage_of(declaration: str, first_id: int, zeroed: bool) -> tuple[str, int]:
    """C++ for the variables of one `threadgroup TYPE a[N], b;` and how many they are."""
    head = re.match(
        r"(?s)\s*((?:const\s+|typename\s+)*[\w:]+(?:\s*<.*>)?(?:::\w+)*)\s+(.*)$", declaration
    )
    text, names = "", split_arguments(head[2])
    for ident, part in enumerate(names, first_id):
        name, array = re.match(r"(?s)\s*(\w+)\s*(.*)$", part).groups()
        kind = f"msl_group{ident}"
        text += (
            f"using {kind} = {head[1]}{array}; threadgroup {kind}& {name} = *(threadgroup {kind}*)"
            f'(uintptr_t)msl_rt_tg({ident}, "{name}", sizeof({kind}), {int(zeroed)});'
        )
    return text, len(names)


def place_group_variables(text: str) -> str:
    """Turn `threadgroup T name[N];` into storage that the runtime provides."""
    tokens, out, previous, i, ident = TOKEN.findall(text), [], "", 0, 1
    while i < len(tokens):
        if tokens[i] == "threadgroup" and previous in ("{", "}", ";", ""):
            end = i
            while tokens[end] not in (";", "{", "("):
                end += 1
            declaration = "".join(t for t in tokens[i + 1 : end] if is_code(t) or t.isspace())
            zeroed = bool(re.search(r"=\s*$", declaration)) and tokens[end] == "{"
            if zeroed:  # `= {0}`: MLX writes it, though the specification has no initialisers
                while tokens[end] != ";":
                    end += 1
                declaration = declaration.split("=")[0]
            flat = re.sub(r"<[^<>]*(<[^<>]*>[^<>]*)*>|\[[^\]]*\]", "", declaration)
            if tokens[end] == ";" and not re.search(r"[*&=]", flat):
                storage, count = storage_of(declaration, ident, zeroed)
                out.append(storage + "\n" * "".join(tokens[i:end]).count("\n"))
                ident, i, previous = ident + count, end + 1, ";"
                continue
        out.append(tokens[i])
        if is_code(tokens[i]):
            previous = tokens[i]
        i += 1
    return "".join(out)


def to_cpp(text: str) -> str:
    text = re.sub(
        r"(?:static\s+)?\bconstant\s+(\w+)\s+(\w+)\s*"
        r"\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]\s*;",
        r"static const \1 \2 = \1(MSL_FC_\3);",
        text,
    )
    text = drop_qualified_members(strip_attributes(text))
    # an array parameter is a pointer; clang wants it spelt so when it has an address space
    text = re.sub(
        r"(\b(?:constant|device|threadgroup)\b[^,;(){}=\[\]]*?)\b(\w+)\[\w*\](?=\s*[,)])",
        r"\1* \2",
        text,
    )
    return place_group_variables(text)


# ------------------------------------------------------------------- the kernel's parameters
@dataclass(frozen=True)
class Parameter:
    name: str
    attribute: str | None = None  # a thread attribute, or None for a buffer
    buffer: int = -1
    is_reference: bool = False

    @property
    def argument(self) -> str:
        if self.attribute in VECTOR_ATTRIBUTES:
            return f"msl_position{{t->{VECTOR_ATTRIBUTES[self.attribute]}}}"
        if self.attribute:
            return SCALAR_ATTRIBUTES[self.attribute]
        return f"msl_{'reference' if self.is_reference else 'pointer'}{{b[{self.buffer}]}}"


def parameters(text: str, function: str) -> list[Parameter]:
    """Parameters of the last kernel of that name."""
    clean = without_comments(text)
    kernel = r"(?:\[\[\s*kernel\b[^\]]*(?:\]\]|\)\s*\]\])|\bkernel\b)"
    found = list(re.finditer(rf"{kernel}[^;{{}}()]*?\bvoid\s+{re.escape(function)}\s*\(", clean))
    if not found:
        raise MetalError(f"no kernel {function} in the source")
    start = end = found[-1].end()
    depth = 1
    while depth:
        depth += (clean[end] == "(") - (clean[end] == ")")
        end += 1
    result, next_buffer = [], 0
    for text in split_arguments(clean[start : end - 1]):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?", text)
        name = re.search(r"(\w+)\s*(?:\[\[.*)?$", text.strip(), re.S)[1]
        if attribute and attribute[1] in {**VECTOR_ATTRIBUTES, **SCALAR_ATTRIBUTES}:
            result.append(Parameter(name, attribute[1]))
            continue
        buffer = int(attribute[2]) if attribute and attribute[1] == "buffer" else next_buffer
        next_buffer = buffer + 1
        result.append(Parameter(name, None, buffer, "&" in text.split("[[")[0]))
    return result


ENTRY = """
#line 1 "entry"
struct msl_thread {
  uint in_grid[3], in_group[3], group_pos[3], group_size[3], full_group[3], grid[3], groups[3];
  uint index, lane, simdgroup, simdgroups, full_simdgroups;
};
struct msl_position {
  const uint* v;
  template <class T, class = metal::enable_if_t<metal::is_integral_v<T>>>
  operator T() const { return T(v[0]); }
  template <class T> operator metal::vec<T, 2>() const { return {T(v[0]), T(v[1])}; }
  template <class T> operator metal::vec<T, 3>() const { return {T(v[0]), T(v[1]), T(v[2])}; }
};
struct msl_pointer {
  void* p;
  template <class T> operator T*() const { return (T*)(uintptr_t)p; }
};
struct msl_reference {
  void* p;
  template <class T> operator T&() const { return *(T*)(uintptr_t)p; }
};
extern "C" void msl_entry(void* const* b, const msl_thread* t) { %s(%s); }
"""


def translate(
    text: str,
    instance: str,
    *,
    roots: Iterable[str] = (),
    prelude: str = "",
    constants: dict[int, int | bool] | None = None,
) -> tuple[list[Parameter], str]:
    """Make one C++ translation unit of a kernel.

    Args:
        text: Metal source.
        instance: name of the kernel, with template arguments if it has any.
        roots: folders that #include "..." looks in.
        prelude: Metal source in front, with line numbers of its own.
        constants: values of function constants, by index (others are 0).

    Returns:
        The kernel's parameters and the C++ text.
    """
    roots, seen = list(roots), set()
    source = inline_includes(prelude, roots, seen, "prelude") + "\n"
    source += inline_includes(text, roots, seen)
    values = {int(i): 0 for i in re.findall(r"function_constant\s*\(\s*(\d+)\s*\)", source)}
    values.update(constants or {})
    defines = "".join(f"#define MSL_FC_{i} {int(v)}\n" for i, v in values.items())
    found = parameters(source, instance.split("<")[0])
    entry = ENTRY % (instance, ", ".join(p.argument for p in found))
    head = defines + '#include "metal_host.h"\nusing namespace metal;\n'
    return found, head + to_cpp(source) + entry
