# cmake -DNM=... -DOBJECTS="a.o;b.o" -P isa_symbols.cmake
#
# An object that was compiled for one instruction set may define nothing but its kernel table. A weak
# symbol, as inline functions and templates leave, would be merged with that of other objects, and
# the version with AVX-512 in it could become everybody's.
set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "(pool|grad)_rows_[a-z0-9]+\\.cc\\.o$")
    continue()
  endif()
  math(EXPR checked "${checked} + 1")
  execute_process(COMMAND "${NM}" --extern-only --defined-only "${object}"
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(STRIP "${symbols}" symbols)
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(NOT symbol MATCHES "k(Pool|Grad)Rows")
      message(SEND_ERROR "${object} defines ${symbol}")
    endif()
  endforeach()
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no kernel object in ${OBJECTS}")
endif()
